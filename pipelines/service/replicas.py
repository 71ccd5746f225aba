"""A gateway's side of the replicas: asks one of them, and hears all that one makes for it on one stream.

A replica of the same machine has a line to the gateway while its stream is open (pipe.py): what is asked of it then
goes that way too. A call of Ray Serve costs 11 ms of processor, and takes 4 to 8 where the engine wants the same cores.
"""

import asyncio
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeAlias

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from pipelines.service.calls import Calls, Heard, Request
from pipelines.service.pipe import Line
from pipelines.service.prefixes import ledger_of
from pipelines.service.protocol import Answer, OverloadedError, ReplicaLostError

Answers: TypeAlias = "dict[int, asyncio.Future[Answer | None]]"  # to requests, by number; None: it was not read

STATS_TIMEOUT_S = 5
SUBMIT_TIMEOUT_S = 60  # for a replica to take a request: one starts in less, and one that hangs never does


class Replicas:
    """A Backend: hands each request to one of the replicas of a deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._ledger = ledger_of(handle.app_name, handle.deployment_name)
        self._name = secrets.token_hex(8)
        self._calls = Calls()
        self._open: dict[str, set[int]] = defaultdict(set)  # numbers of the requests that a replica has
        self._streams: dict[str, asyncio.Task[None]] = {}  # one a replica while it has requests
        self._lines: dict[str, tuple[Line, Answers]] = {}  # of the streams that have one
        self._farewells: set[asyncio.Task[None]] = set()  # asyncio itself would lose them

    async def generate(
        self, tokens: list[int], params: SampleParams, *, admitted: bool = False
    ) -> AsyncGenerator[Output, None]:
        """As Backend.generate. Raises ReplicaLostError, OverloadedError."""
        number = self._calls.open()
        key, replies = (self._name, number), [list[int]() for _ in range(params.n)]
        self._ledger.began(key)
        submitted = asyncio.create_task(self._submit(Request(number, tokens, params, admitted)))
        whole = False
        try:
            await asyncio.shield(submitted)
            async with aclosing(self._calls.outputs(number, params.n)) as outputs:
                async for output in outputs:
                    if not any(replies):
                        self._ledger.heard(key)
                    replies[output.index] += output.tokens
                    yield output
            whole = True
        finally:
            self._calls.close(number)
            self._ledger.ended(key, replies)
            submitted.add_done_callback(lambda done: self._closed(number, done, whole=whole))

    async def stats(self) -> list[Stats]:
        """As Backend.stats; a replica that does not answer is left out."""
        try:
            answers = await self._handle.broadcast("stats").results_async(
                timeout_s=STATS_TIMEOUT_S, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError) as error:
            raise ReplicaLostError(f"no replica says its load: {type(error).__name__}") from error
        return [answer for answer in answers if isinstance(answer, Stats)]

    async def _submit(self, request: Request) -> str:
        """The replica that has taken the request. Raises OverloadedError when all refuse, ReplicaLostError."""
        key, params = (self._name, request.number), request.params
        refused: dict[str, OverloadedError] = {}
        while True:
            best = self._ledger.place(key, request.tokens, params.max_tokens, params.n, frozenset(refused))
            if best in refused:
                break  # there is no other
            answer = await self._ask(best or "", request, frozenset(refused))
            if answer.error is None:
                self._open[answer.replica].add(request.number)
                if answer.replica not in self._streams:
                    self._streams[answer.replica] = asyncio.create_task(self._listen(answer.replica))
                return answer.replica
            if answer.replica in refused:
                break
            refused[answer.replica] = answer.error
        raise min(refused.values(), key=lambda error: error.retry_after_s or 0)

    async def _ask(self, replica: str, request: Request, refused: frozenset[str]) -> Answer:
        """Through the line to a replica; by Ray Serve where there is none, or it has not read it; "": any.

        Raises ReplicaLostError.
        """
        try:
            async with asyncio.timeout(SUBMIT_TIMEOUT_S):
                if replica in self._lines:
                    line, answers = self._lines[replica]
                    answers[request.number] = asyncio.get_running_loop().create_future()
                    line.say(request)
                    if answer := await answers[request.number]:
                        return answer
                by_ray: Answer = await self._handle.submit.remote(replica, self._name, request, refused)
                return by_ray
        except TimeoutError:
            raise ReplicaLostError(f"no replica took the request within {SUBMIT_TIMEOUT_S} s") from None
        except RayTaskError as error:  # what the replica's own code raised
            raise error.cause from error
        except (RayError, RayServeException) as error:
            raise ReplicaLostError(repr(error)) from error

    async def _listen(self, replica: str) -> None:
        """Hands out what a replica makes, as long as it has requests of ours."""
        why = "the replica has forgotten the request"
        try:
            while asked := set(self._open[replica]):
                await self._hear_stream(replica)
                if forgotten := asked & self._open[replica]:  # it ends its stream when it has nothing of ours
                    self._calls.hear([(number, ReplicaLostError(why)) for number in forgotten])
                    self._open[replica] -= forgotten
        except Exception as error:
            self._calls.hear([(number, ReplicaLostError(repr(error))) for number in self._open[replica]])
        finally:
            del self._streams[replica], self._open[replica]

    async def _hear_stream(self, replica: str) -> None:
        """Each has a line of its own: what was asked through it, and is not answered when it ends, was not read."""
        answers: Answers = {}

        def hear(message: Sequence[tuple[int, Any]]) -> None:
            self._lines[replica] = line, answers  # it has opened its end
            said: list[Heard] = []
            for number, item in message:
                if number in answers:
                    self._answered(replica, number, item, answers.pop(number))
                else:
                    said.append((number, item))
            self._calls.hear(said)

        line, address = Line.made(hear)
        try:
            async for message in self._streaming.outputs.remote(replica, self._name, address):
                self._calls.hear(message)
        finally:
            line.read()  # what was said before the end
            line.close()
            self._lines.pop(replica, None)
            for answer in answers.values():
                if not answer.done():
                    answer.set_result(None)

    def _answered(self, replica: str, number: int, item: Answer | Exception, answer: "asyncio.Future[Any]") -> None:
        """The first that a replica says to what was asked through its line."""
        if isinstance(item, Answer) and item.error is None:
            self._open[replica].add(number)
        if answer.done():  # nobody waits for it any more
            return
        if isinstance(item, Answer):
            answer.set_result(item)
        else:
            answer.set_exception(item)

    def _closed(self, number: int, submitted: "asyncio.Task[str]", *, whole: bool) -> None:
        """Nobody reads this request any more."""
        if submitted.cancelled() or submitted.exception() is not None:
            return
        replica = submitted.result()
        if replica in self._open:
            self._open[replica].discard(number)
        if not whole:
            task = asyncio.create_task(self._cancel(replica, number))
            self._farewells.add(task)
            task.add_done_callback(self._farewells.discard)

    async def _cancel(self, replica: str, number: int) -> None:
        with suppress(RayError, RayServeException):  # it is gone, and the request with it
            await self._handle.cancel.remote(replica, self._name, number)
