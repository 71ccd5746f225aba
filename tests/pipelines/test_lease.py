import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import lease
from pipelines.artifacts import Dir, LocalStore, StoreError
from pipelines.lease import Holder, Lease, StageHeld, holder

HOST = socket.gethostname()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dir:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "DEAD_S", 0.6)
    return LocalStore(tmp_path).dir("checkpoint/base-0123456789abcdef", "work")


def taken(work: Dir, host: str = HOST, pid: int | None = None, *, wait: bool = False) -> Lease:
    me = Holder(pipeline="speedrun", stage="base", host=host, pid=os.getpid() if pid is None else pid)
    return Lease(work, me, wait=wait, tell=lambda _: None, when_lost=lambda: None)


def dead_pid() -> int:
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    assert child.pid is not None
    return child.pid


def left_behind(work: Dir, host: str, pid: int, number: int = 1) -> None:
    """The file of a run that was killed."""
    me = Holder(pipeline="speedrun", stage="base", host=host, pid=pid, number=number)
    work.put(f".lease-{number:08d}.json", lease._bytes(me))


def test_a_live_holder_is_named_with_how_far_it_is(work: Dir) -> None:
    with taken(work) as held:
        held.progress({"done": 120, "total": 390, "unit": "step"})
        with (
            pytest.raises(StageHeld, match=rf"stage base is being built by {HOST}:{os.getpid()}, 120 of 390 "),
            taken(work),
        ):
            pass
    with taken(work):
        pass  # it was let go


def test_a_dead_process_of_this_host_is_taken_over_at_once(work: Dir) -> None:
    left_behind(work, HOST, dead_pid())
    start = time.monotonic()
    with taken(work) as held:
        assert time.monotonic() - start < 0.3
        assert held.me.number == 2
        assert [n for n in os.listdir(work.uri()) if "lease" in n] == [".lease-00000002.json"]


def test_another_host_is_watched_and_taken_over_when_its_heart_stands_still(work: Dir) -> None:
    left_behind(work, "elsewhere", 1)
    start = time.monotonic()
    with taken(work):
        assert time.monotonic() - start >= 0.6


def test_another_host_that_lives_keeps_it_whatever_the_clocks_say(work: Dir) -> None:
    with taken(work, host="elsewhere"):
        found = holder(work)
        assert found is not None
        assert found.who == f"elsewhere:{os.getpid()}"
        for path in Path(work.uri()).iterdir():
            os.utime(path, (0, 0))
        with pytest.raises(StageHeld), taken(work):
            pass


def test_with_wait_the_second_goes_on_when_the_first_lets_go(work: Dir) -> None:
    order: list[str] = []
    begun = threading.Event()

    def first() -> None:
        with taken(work):
            begun.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    with taken(work, wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_of_many_that_come_at_once_one_holds_it(work: Dir) -> None:
    left_behind(work, HOST, dead_pid(), number=7)
    results: list[str] = []
    start, end = threading.Barrier(6), threading.Event()

    def come() -> None:
        start.wait()
        try:
            with taken(work):
                results.append("held")
                end.wait(10)
        except StageHeld:
            results.append("refused")

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(results) == 6)
    end.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held", *["refused"] * 5]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_who_was_taken_over_learns_it_and_does_not_write_again(work: Dir) -> None:
    with taken(work) as held:
        assert not held.lost()
        left_behind(work, "elsewhere", 1, number=2)
        until(held.lost)
        work.delete(".lease-00000001.json")  # as the new holder does
    assert not Path(work.uri(".lease-00000001.json")).exists()
    found = holder(work)
    assert found is not None
    assert (found.host, found.released) == ("elsewhere", False)


def test_one_who_cannot_write_its_heartbeat_gives_up(work: Dir, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    lost: list[str] = []
    me = Holder(pipeline="speedrun", stage="base", host=HOST, pid=os.getpid())

    def refuse(*_: object) -> None:
        raise StoreError("the store is full")

    held = Lease(work, me, wait=False, tell=said.append, when_lost=lambda: lost.append("lost"))
    with held, monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", refuse)
        until(held.lost)
        until(lambda: lost == ["lost"])
    assert "the heartbeat could not be written, will try again: the store is full" in said


def test_a_lease_that_is_taken_over_between_two_looks_is_not_missed(work: Dir, monkeypatch: pytest.MonkeyPatch) -> None:
    left_behind(work, HOST, 1, number=8)
    listings = iter([[7], [8]])  # 7 was listed, and is gone when it is opened
    monkeypatch.setattr(lease, "_numbers", lambda _: next(listings))
    found = holder(work)
    assert found is not None
    assert found.number == 8


def test_the_lease_is_no_work(work: Dir) -> None:
    with taken(work):
        assert work.list() == []
        assert work.store.state(work.address) == "missing"
