"""A gateway's side of the replicas: asks one of them, and hears all that one makes for it on one stream."""

import asyncio
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from pipelines.service.calls import Calls
from pipelines.service.pipe import Listener
from pipelines.service.prefixes import ledger_of
from pipelines.service.protocol import OverloadedError, ReplicaLostError

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
        self._farewells: set[asyncio.Task[None]] = set()  # asyncio itself would lose them

    async def generate(
        self, tokens: list[int], params: SampleParams, *, admitted: bool = False
    ) -> AsyncGenerator[Output, None]:
        """As Backend.generate. Raises ReplicaLostError, OverloadedError."""
        number = self._calls.open()
        key, replies = (self._name, number), [list[int]() for _ in range(params.n)]
        self._ledger.began(key)
        submitted = asyncio.create_task(self._submit(number, tokens, params, admitted))
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

    async def _submit(self, number: int, tokens: list[int], params: SampleParams, admitted: bool) -> str:
        """The replica that has taken the request. Raises OverloadedError when all refuse, ReplicaLostError."""
        refused: dict[str, OverloadedError] = {}
        while True:
            asked = self._handle.submit.remote(
                self._name, number, tokens, params, refused=frozenset(refused), admitted=admitted
            )
            try:
                async with asyncio.timeout(SUBMIT_TIMEOUT_S):
                    answer = await asked
            except TimeoutError:
                raise ReplicaLostError(f"no replica took the request within {SUBMIT_TIMEOUT_S} s") from None
            except RayTaskError as error:  # what the replica's own code raised
                raise error.cause from error
            except (RayError, RayServeException) as error:
                raise ReplicaLostError(repr(error)) from error
            replica = str(answer.replica)
            if answer.error is None:
                self._open[replica].add(number)
                if replica not in self._streams:
                    self._streams[replica] = asyncio.create_task(self._listen(replica))
                return replica
            if replica in refused:  # so there was no other
                raise min(refused.values(), key=lambda error: error.retry_after_s or 0)
            refused[replica] = answer.error

    async def _listen(self, replica: str) -> None:
        """Hands out what a replica makes, as long as it has requests of ours."""
        why = "the replica has forgotten the request"
        pipe = Listener(self._calls.hear)
        try:
            while asked := set(self._open[replica]):
                try:
                    async for message in self._streaming.outputs.remote(replica, self._name, pipe.address):
                        self._calls.hear(message)
                finally:
                    pipe.read()  # what was said before the end
                if forgotten := asked & self._open[replica]:  # it ends its stream when it has nothing of ours
                    self._calls.hear([(number, ReplicaLostError(why)) for number in forgotten])
                    self._open[replica] -= forgotten
        except Exception as error:
            self._calls.hear([(number, ReplicaLostError(repr(error))) for number in self._open[replica]])
        finally:
            pipe.close()
            del self._streams[replica], self._open[replica]

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
