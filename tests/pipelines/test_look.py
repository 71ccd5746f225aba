import os
import socket
from pathlib import Path

import pytest

from pipelines import lease
from pipelines.artifacts import LocalStore, StoreError
from pipelines.documents import SourceError, SourceFile
from pipelines.lease import Holder
from pipelines.load import load
from pipelines.look import Seen, alive, look
from pipelines.plan import Step
from pipelines.runner import StageFailed
from tests.pipelines.fakes import FILE, build, fake_sources, stages, steps_of


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def seen(store: LocalStore, steps: list[Step] | None = None) -> dict[str, Seen]:
    return {s.step.name: s for s in look(steps or steps_of(), store, "speedrun", FILE.parent, stages())}


def test_states_paths_and_named_changes(store: LocalStore) -> None:
    assert {(s.state, s.why) for s in seen(store).values()} == {("missing", "never built")}
    build(store, steps_of())
    after = seen(store)
    assert {(s.state, s.why, s.changes, s.notice) for s in after.values()} == {("built", "", (), "")}
    assert all(s.path and Path(s.path, "data.txt").exists() for s in after.values())
    changed = seen(store, steps_of(load(FILE, "laptop", ["chat.epochs=2", "dialogues.holdout=0.01"])))
    assert {n for n, s in changed.items() if s.state == "built"} == {"vocabulary", "corpus", "base", "base_report"}
    assert changed["chat"].changes == ("input dialogues", "epochs 1.2 -> 2.0")
    assert changed["bundle"].changes == ("input chat",)
    assert (changed["chat"].state, changed["chat"].why, changed["chat"].path) == ("missing", "changed", None)


def test_changes_are_against_the_newest_build_of_this_pipeline(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (steps_of(load(FILE, "laptop", [f"vocabulary.size={n}"]), "vocabulary") for n in (5000, 6000))
    build(store, old)
    build(store, new)
    build(store, steps_of(load(FILE, "laptop", ["vocabulary.size=7000"]), "vocabulary"), pipeline="another")
    assert seen(store)["vocabulary"].changes == ("size 6000 -> 4096",)


def test_work_and_damage_are_told_apart(store: LocalStore) -> None:
    steps = steps_of(only="corpus")
    with pytest.raises(StageFailed):
        build(store, steps, "plug")
    assert seen(store)["vocabulary"].state == "partial"
    build(store, steps[:1])
    Path(store.data(steps[0].address).uri("data.txt")).unlink()
    broken = seen(store)["vocabulary"]
    assert (broken.state, broken.path) == ("missing", None)
    assert "data.txt is gone" in broken.why
    assert "--rebuild vocabulary" in broken.why


def test_other_code_is_a_notice(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    build(store, steps_of(only="vocabulary"))
    monkeypatch.setattr("pipelines.look.code_digest", lambda target: "other")
    assert "made by other code" in seen(store)["vocabulary"].notice


def test_a_store_that_cannot_be_asked_is_asked_once(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(self: LocalStore, name: str) -> None:
        asked.append(name)
        raise StoreError("no connection")

    monkeypatch.setattr(LocalStore, "open", refuse)
    found = seen(store)
    assert {(s.state, s.why) for s in found.values()} == {("unknown", "no connection")}
    assert len(asked) == 1


def test_a_changed_source_is_said_and_one_that_cannot_be_reached_is_a_notice(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [SourceFile("a.parquet", 1, "1")]
    fake_sources(monkeypatch, files)
    remote = steps_of(load(FILE, "laptop", ["vocabulary.source=s3://b/*.parquet"]), "vocabulary")
    build(store, remote, "reads")
    files[0] = SourceFile("a.parquet", 2, "2")
    changed = seen(store, remote)["vocabulary"]
    assert changed.source_changed
    assert "a.parquet changed" in changed.why

    def refuse(source: str, base: Path) -> None:
        raise SourceError("no network")

    monkeypatch.setattr("pipelines.sources.listing", refuse)
    unreachable = seen(store, remote)["vocabulary"]
    assert (unreachable.state, unreachable.source_changed) == ("built", False)
    assert "no network" in unreachable.notice


def test_running_lost_and_let_go(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(only="vocabulary")
    work = store.dir(steps[0].address, "work")

    def state() -> str:
        (one,) = alive(list(seen(store, steps).values()), store)
        return one.state

    def held(host: str, pid: int, *, released: bool = False) -> None:
        me = Holder(pipeline="speedrun", stage="vocabulary", host=host, pid=pid, number=1, released=released)
        work.put(".lease-00000001.json", lease._bytes(me))

    assert state() == "missing"
    held(socket.gethostname(), os.getpid())
    assert state() == "running"
    held(socket.gethostname(), 2**22 + 1)  # above the largest pid there can be
    assert state() == "lost"
    held("elsewhere", 1)
    assert state() == "running"
    os.utime(work.uri(".lease-00000001.json"), (0, 0))
    assert state() == "lost"
    held("elsewhere", 1, released=True)
    assert state() == "missing"
