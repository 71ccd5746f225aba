"""A gateway's side of the replicas, over a deployment's handle that is scripted: refusals, silence, cancelling."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from pipelines.service.calls import Heard, Request
from pipelines.service.pipe import Address, Line
from pipelines.service.protocol import Answer, OverloadedError, ReplicaLostError
from pipelines.service.replicas import Replicas

PARAMS = SampleParams(3, seed=1)
OVERLOADED = Answer("a", OverloadedError("many wait", 3))
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="pipes are found under /proc, on Linux")


class Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Handle:
    """Stands for Serve's. says: what the replicas answer to each submit, in turn; the last again and again."""

    deployment_name = "Replica-1"

    def __init__(self, *says: Answer | Exception, stream: Callable[[], AsyncGenerator[list[Heard], None]]) -> None:
        self.says, self.stream = list(says), stream
        self.app_name = secrets.token_hex(8)  # the ledger of another test may not be gone yet
        self.line: Address | None = None  # of the newest stream
        self.wanted: list[str] = []  # replicas
        self.refused: list[frozenset[str]] = []
        self.cancelled: list[tuple[str, int]] = []
        self.submit, self.outputs, self.cancel = Method(self._submit), Method(self._outputs), Method(self._cancel)

    def options(self, *, stream: bool) -> "Handle":
        return self

    def _submit(self, replica: str, client: str, request: Request, refused: frozenset[str]) -> Awaitable[Any]:
        self.wanted.append(replica)
        self.refused.append(refused)

        async def answer() -> Answer:
            said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
            if isinstance(said, Exception):
                raise said
            return said

        return answer()

    def _outputs(self, replica: str, client: str, line: Address | None) -> AsyncGenerator[list[Heard], None]:
        self.line = line
        return self.stream()

    async def _cancel(self, replica: str, client: str, number: int) -> None:
        self.cancelled.append((replica, number))


async def nothing() -> AsyncGenerator[list[Heard], None]:
    await asyncio.sleep(3600)
    yield []


async def two_steps() -> AsyncGenerator[list[Heard], None]:
    yield [(0, Output(9, [1, 2]))]
    yield [(7, Output(8, [5])), (0, Output(9, [3], finish="length"))]


async def ended() -> AsyncGenerator[list[Heard], None]:
    return
    yield []


async def died() -> AsyncGenerator[list[Heard], None]:
    yield [(0, Output(9, [1]))]
    raise ActorDiedError


def said(handle: Handle) -> list[int]:
    async def ask() -> list[int]:
        return [token async for output in Replicas(handle).generate([1], PARAMS) for token in output.tokens]  # type: ignore[arg-type]

    return asyncio.run(ask())


def test_what_a_replica_makes_is_heard_on_its_stream() -> None:
    handle = Handle(Answer("a"), stream=two_steps)
    assert said(handle) == [1, 2, 3]
    assert handle.cancelled == []


@linux
@pytest.mark.parametrize("death", [None, ActorDiedError()])
def test_what_was_said_through_the_pipe_is_heard_before_its_end_is(death: Exception | None) -> None:
    async def speaks() -> AsyncGenerator[list[Heard], None]:
        line = Line.at(handle.line, print)
        assert line is not None
        async for message in two_steps():
            line.say(message)
        line.close()
        if death:
            raise death
        yield []

    handle = Handle(Answer("a"), stream=speaks)
    assert said(handle) == [1, 2, 3]
    assert said(handle) == [1, 2, 3]  # each has a line of its own


Says = Callable[[int, Request], list[tuple[int, Any]] | None]


@linux
@pytest.mark.parametrize(
    ("says", "found", "by_ray"),
    [
        (lambda number, request: [(number, Answer("a")), (number, Output(9, [4], finish="length"))], [4], 1),
        (lambda number, request: [(number, OVERLOADED)], OverloadedError, 1),  # and there is no other
        (lambda number, request: [(number, ReplicaLostError("broken"))], ReplicaLostError, 1),
        (lambda number, request: None, [7], 2),  # it ends its stream and has not read it
    ],
)
def test_who_has_a_line_is_asked_through_it(says: Says, found: Any, by_ray: int) -> None:
    """The first request goes by Ray and holds the stream open; the second is asked while it is."""
    asked: list[Request] = []

    async def replica() -> AsyncGenerator[list[Heard], None]:
        if asked:  # the second stream
            yield [(1, Output(9, [7], finish="length"))]
        news = asyncio.Event()

        def hear(request: Request) -> None:
            asked.append(request)
            news.set()

        line = Line.at(handle.line, hear)
        assert line is not None
        line.say([])
        line.say([(0, Output(9, [1]))])
        await news.wait()
        if (answer := says(asked[0].number, asked[0])) is not None:
            line.say(answer)
            line.say([(0, Output(9, [2], finish="length"))])
            await asyncio.sleep(0.1)
        line.close()

    handle = Handle(Answer("a"), stream=replica)

    async def ask() -> list[int]:
        replicas = Replicas(handle)  # type: ignore[arg-type]
        replicas._ledger.update(["a"])
        async with aclosing(replicas.generate([1], PARAMS)) as first:
            await anext(first)
            return [token async for output in replicas.generate([1, 2], PARAMS) for token in output.tokens]

    if isinstance(found, list):
        assert asyncio.run(ask()) == found
    else:
        with pytest.raises(found):
            asyncio.run(ask())
    assert [(request.number, request.tokens, request.params) for request in asked] == [(1, [1, 2], PARAMS)]
    assert len(handle.wanted) == by_ray
    assert set(handle.wanted) == {"a"}


def test_who_refuses_is_not_asked_again_and_the_soonest_wait_is_told() -> None:
    full = [Answer(name, OverloadedError("many wait", wait)) for name, wait in (("a", 9), ("b", 4))]
    handle = Handle(*full, full[0], stream=two_steps)
    with pytest.raises(OverloadedError, match="ask again in 4 s"):
        said(handle)
    assert handle.refused == [frozenset(), frozenset("a"), frozenset("ab")]
    assert said(Handle(full[0], Answer("b"), stream=two_steps)) == [1, 2, 3]


@pytest.mark.parametrize(("stream", "why"), [(ended, "forgotten"), (died, "Actor")])
def test_a_stream_that_ends_too_early_is_a_lost_replica(stream: Any, why: str) -> None:
    with pytest.raises(ReplicaLostError, match=why):
        said(Handle(Answer("a"), stream=stream))


def test_a_dead_replica_is_a_lost_one() -> None:
    with pytest.raises(ReplicaLostError):
        said(Handle(ActorDiedError(), stream=two_steps))


def test_a_replica_that_never_answers_is_a_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Handle):
        def _submit(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
            return asyncio.sleep(3600)

    monkeypatch.setattr("pipelines.service.replicas.SUBMIT_TIMEOUT_S", 0.1)
    with pytest.raises(ReplicaLostError, match=r"no replica took the request within 0\.1 s"):
        said(Hanging(Answer("a"), stream=nothing))


def test_a_reader_that_leaves_cancels_at_its_replica() -> None:
    async def some() -> AsyncGenerator[list[Heard], None]:
        yield [(0, Output(9, [1]))]
        await asyncio.sleep(3600)

    handle = Handle(Answer("a"), stream=some)

    async def leave() -> None:
        replicas = Replicas(handle)  # type: ignore[arg-type]
        async with aclosing(replicas.generate([1], PARAMS)) as outputs:
            await anext(outputs)
        await asyncio.sleep(0.05)

    asyncio.run(leave())
    assert handle.cancelled == [("a", 0)]
