"""What goes through a line: all of it, in order, whatever the sizes, and nobody waits; a replica that has one."""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from pipelines.service import replica as replica_module
from pipelines.service.calls import Heard, Request
from pipelines.service.pipe import Address, Line
from pipelines.service.protocol import Answer, OverloadedError, ReplicaLostError
from pipelines.service.replica import Replica
from pipelines.service.worker import Worker
from tests.reference.generate import generate
from tests.serving import tiny_model, tiny_runner

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="pipes are found under /proc, on Linux")


def some(number: int, size: int = 3) -> list[Heard]:
    return [(number, Output(number, list(range(size))))]


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Line, Address, list[Any]]]:
    heard: list[Any] = []
    line, address = Line.made(heard.extend)
    assert address is not None
    try:
        yield line, address, heard
    finally:
        line.close()


def far_end(address: Address | None, hear: Callable[[Any], None] = print) -> Line:
    line = Line.at(address, hear)
    assert line is not None
    return line


async def until(heard: Sequence[Heard], count: int) -> None:
    async with asyncio.timeout(20):
        while len(heard) < count:
            await asyncio.sleep(0.005)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def talk(address: Address, sizes: list[int], said: Event, go_on: Event) -> None:
    """In another process: says a message of each size."""

    async def say() -> None:
        speaker = far_end(address)
        for number, size in enumerate(sizes):
            speaker.say(some(number, size))
        said.set()
        while speaker.busy:
            await asyncio.sleep(0.005)
        go_on.wait()

    asyncio.run(say())


def test_another_process_is_heard_whole_and_in_order() -> None:
    spawn = multiprocessing.get_context("spawn")
    sizes = [1, 3, 0, 100_000, 2, 300_000, 1] + [5] * 5_000  # many times what a pipe holds

    async def run() -> list[Heard]:
        async with listening() as (_, address, heard):
            said, go_on = spawn.Event(), spawn.Event()
            process = spawn.Process(target=talk, args=(address, sizes, said, go_on))
            process.start()
            await asyncio.to_thread(said.wait, 60)  # it has said all of it although nobody read: it never waits
            await until(heard, len(sizes))
            go_on.set()
            await asyncio.to_thread(process.join)
            return heard

    heard = asyncio.run(run())
    assert [(number, output.tokens) for number, output in heard if isinstance(output, Output)] == [
        (number, list(range(size))) for number, size in enumerate(sizes)
    ]


def test_of_a_speaker_that_was_killed_all_whole_messages_are_heard() -> None:
    spawn = multiprocessing.get_context("spawn")

    async def run() -> list[Heard]:
        async with listening() as (listener, address, heard):
            asyncio.get_running_loop().remove_reader(listener._read)  # so that the pipe is full when it dies
            said, go_on = spawn.Event(), spawn.Event()
            process = spawn.Process(target=talk, args=(address, [3, 3, 100_000, 3], said, go_on))
            process.start()
            await asyncio.to_thread(said.wait, 60)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            await asyncio.to_thread(process.join)
            assert heard == []
            listener.read()
            return heard

    assert asyncio.run(run()) == [*some(0), *some(1)]  # of the third a part was in the pipe


def test_both_ends_speak_and_hear() -> None:
    """Also when each says more than a pipe holds before it reads anything."""

    async def run() -> None:
        async with listening() as (near, address, heard):
            there: list[Any] = []
            far = far_end(address, there.extend)
            for number in range(200):
                near.say(some(number, 1_000))
                far.say(some(-number, 1_000))
            assert near.busy
            assert far.busy
            await until(heard, 200)
            await until(there, 200)
            assert [number for number, _ in there] == list(range(200))
            assert [number for number, _ in heard] == [-number for number in range(200)]
            far.close()

    asyncio.run(run())


def test_an_end_whose_other_is_closed_does_not_wake_for_ever() -> None:
    async def run() -> None:
        async with listening() as (_, address, _heard):
            far = far_end(address)
        reads = 0
        read = far.read

        def counted() -> None:
            nonlocal reads
            reads += 1
            read()

        asyncio.get_running_loop().add_reader(far._read, counted)
        await asyncio.sleep(0.05)
        far.close()
        assert reads == 1

    asyncio.run(run())


def test_errors_are_heard_too() -> None:
    async def run() -> Heard:
        async with listening() as (_, address, heard):
            speaker = far_end(address)
            speaker.say([(7, ReplicaLostError("it died"))])
            await until(heard, 1)
            speaker.close()
            return heard[0]

    number, error = asyncio.run(run())
    assert number == 7
    assert isinstance(error, ReplicaLostError)
    assert str(error) == "it died"


def test_what_is_not_that_pipe_is_not_opened(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening() as (_, address, _heard):
            file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
            _, other = os.pipe()
            wrong = [
                replace(address, boot="another machine\n"),
                replace(address, reads=(address.reads[0], address.reads[1] + 1)),
                replace(address, writes=(address.writes[0], address.writes[1] + 1)),
                replace(address, writes=(other, address.writes[1])),
                replace(address, writes=(file, os.fstat(file).st_ino)),
                replace(address, reads=(12_345, 1)),
                replace(address, process=2**22 + 1),  # more than Linux gives
            ]
            before = open_files()
            assert [Line.at(one, print) for one in [*wrong, None]] == [None] * (len(wrong) + 1)
            assert open_files() == before
            assert (tmp_path / "file").read_bytes() == b""

    asyncio.run(run())


def test_a_speaker_hears_that_nobody_listens_and_no_file_stays_open() -> None:
    async def run() -> None:
        before = open_files()
        async with listening() as (_, address, _heard):
            speaker = far_end(address)
            for number in range(1_000):
                speaker.say(some(number, 1_000))
            assert speaker.busy
        await asyncio.sleep(0.05)
        assert not speaker.busy
        with pytest.raises(BrokenPipeError):
            speaker.say(some(0))
        speaker.close()
        assert open_files() == before

    asyncio.run(run())


@pytest.fixture
def replica() -> Any:
    """A Replica whose engine is tiny; Serve, which would give it its name, is not there."""
    made = object.__new__(Replica)
    made._worker, made._name, made._clients = Worker(Engine(tiny_runner())), "a", {}
    yield made
    made._worker.close()


PARAMS = SampleParams(24, seed=1)


def test_a_replica_says_all_through_the_pipe_and_its_stream_ends_when_nothing_is_open(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "IDLE_S", 0.05)

    async def run() -> tuple[list[Heard], list[Any]]:
        async with listening() as (listener, address, heard):
            await replica.submit("a", "gateway", Request(5, [1, 2], PARAMS), frozenset())
            await asyncio.sleep(0.05)  # it has made something before anybody listens
            streamed = [message async for message in replica.outputs("a", "gateway", address)]
            listener.read()
            return heard, streamed

    before = open_files()
    heard, streamed = asyncio.run(run())
    assert streamed == []
    assert {number for number, _ in heard} == {5}
    tokens = [token for _, output in heard if isinstance(output, Output) for token in output.tokens]
    assert tokens == generate(tiny_model(), [1, 2], PARAMS)
    assert open_files() == before


def test_a_replica_whose_gateway_is_gone_ends_its_requests(replica: Replica) -> None:
    async def run() -> None:
        listener, address = Line.made(lambda message: None)
        await replica.submit("a", "gateway", Request(0, [1], replace(PARAMS, max_tokens=100)), frozenset())
        async with aclosing(replica.outputs("a", "gateway", address)) as stream:
            reading = asyncio.ensure_future(anext(stream, "over"))
            await asyncio.sleep(0)
            listener.close()
            async with asyncio.timeout(5):
                assert await reading == "over"
        assert replica._clients == {}
        end = time.monotonic() + 5
        while replica._worker.load().num_requests_running and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert replica._worker.load().num_requests_running == 0

    asyncio.run(run())


def test_a_replica_is_asked_through_the_line(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers first, to what it takes, what it has no room for, and where its engine has died."""
    monkeypatch.setattr(replica_module, "IDLE_S", 0.3)

    class Admission:
        def admit(self, tokens: int, replies: int, *, admitted: bool) -> None:
            if not admitted:
                raise OverloadedError("many wait", 3)

        def stepped(self, stats: Stats, seconds: float) -> None:
            pass

    async def run() -> tuple[list[Any], int]:
        async with listening() as (line, address, heard):
            stream = asyncio.ensure_future(anext(replica.outputs("a", "gateway", address), "over"))
            line.say(Request(6, [1, 2], PARAMS))
            await until(heard, 1 + PARAMS.max_tokens)
            replica._worker._admission = Admission()  # type: ignore[assignment]
            line.say(Request(7, [1, 2], PARAMS))
            line.say(Request(8, [1, 2], replace(PARAMS, max_tokens=1), admitted=True))
            await until(heard, 1 + PARAMS.max_tokens + 3)
            assert await stream == "over"
            line.read()
            first = len(heard)
            replica._worker.close()
            stream = asyncio.ensure_future(anext(replica.outputs("a", "gateway", address), "over"))
            line.say(Request(9, [1, 2], PARAMS, admitted=True))
            await until(heard, first + 1)
            stream.cancel()
            return heard, first

    heard, first = asyncio.run(run())
    assert heard[0] == (6, Answer("a"))
    tokens = [token for number, output in heard[1:] if number == 6 for token in output.tokens]
    assert tokens == generate(tiny_model(), [1, 2], PARAMS)
    refusal = next(item for number, item in heard if number == 7)
    assert (refusal.replica, refusal.error.retry_after_s) == ("a", 3)
    assert [type(item) for number, item in heard if number == 8] == [Answer, Output]
    [(number, error)] = heard[first:]
    assert number == 9
    assert isinstance(error, ReplicaLostError)


def test_a_replica_of_another_machine_says_all_on_the_stream(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "IDLE_S", 0.05)

    async def run() -> tuple[list[Heard], list[Heard]]:
        async with listening() as (_, address, heard):
            await replica.submit("a", "gateway", Request(5, [1, 2], PARAMS), frozenset())
            elsewhere = replace(address, boot="another machine\n")
            streamed = [item async for message in replica.outputs("a", "gateway", elsewhere) for item in message]
            return heard, streamed

    heard, streamed = asyncio.run(run())
    assert heard == []
    tokens = [token for _, output in streamed if isinstance(output, Output) for token in output.tokens]
    assert tokens == generate(tiny_model(), [1, 2], PARAMS)
