"""One engine in a thread of its own, asked from asyncio. Knows no HTTP and no Ray.

The thread alone touches the engine. Each request has an asyncio queue on its caller's loop; what lies in it when the
caller wakes is handed on as one piece, so the first token goes out at once and a slow reader gets larger pieces.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from pipelines.service.protocol import ReplicaLostError

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Call:
    """One request on its way to the thread and back."""

    tokens: list[int]
    params: SampleParams
    loop: asyncio.AbstractEventLoop
    out: "asyncio.Queue[Output | Exception]"
    id: int | None = None  # in the engine
    open: int = 0  # replies that have not ended
    left: bool = False  # the caller is not interested any more

    def put(self, item: Output | Exception) -> None:
        """Called by the thread."""
        try:
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)
        except RuntimeError:  # the caller's loop is closed: nobody is left to hear it
            self.left = True


class Worker:
    """A Backend: runs the engine whenever there is a request, sleeps otherwise."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()  # None: close
        self._calls: dict[int, _Call] = {}
        self._stats = engine.stats()
        self._error: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, tokens: list[int], params: SampleParams) -> AsyncGenerator[Output, None]:
        """Outputs of one request as they come. Closing the iterator cancels. Raises ValueError, ReplicaLostError."""
        call = _Call(tokens, params, asyncio.get_running_loop(), asyncio.Queue())
        self._inbox.put(call)
        unfinished = params.n
        try:
            self.check()  # after put: a thread that ends later finds the call in the inbox
            while True:
                items = [await call.out.get()]
                while not call.out.empty():
                    items.append(call.out.get_nowait())
                for output in _joined([item for item in items if isinstance(item, Output)]):
                    unfinished -= output.finish is not None
                    yield output
                if isinstance(items[-1], Exception):
                    raise items[-1]
                if not unfinished:
                    return
        finally:
            call.left = True
            self._inbox.put(call)  # wakes the thread, which then forgets it

    def check(self) -> None:
        """Raises ReplicaLostError if the thread has died or was closed."""
        if self._error is not None:
            raise ReplicaLostError(f"the engine has failed: {self._error!r}")
        if self._closed:
            raise ReplicaLostError("the engine is shut down")

    async def stats(self) -> list[Stats]:
        """As Backend.stats."""
        self.check()
        return [self._stats]

    def load(self) -> Stats:
        """What the engine counts; a snapshot that may be one step old."""
        return self._stats

    def close(self) -> None:
        """Ends the thread; requests that still run get ReplicaLostError."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._take()
                for output in self._engine.step():
                    broken = ReplicaLostError("the model's logits are not finite: its weights are broken")
                    self._calls[output.id].put(broken if output.finish == "error" else output)
                    if output.finish:
                        self._ended(output.id)
                self._stats = self._engine.stats()
        except Exception as error:
            self._error = error
            logger.critical("the engine has failed", exc_info=error)
        finally:
            self._closed = True
            self._abandon()

    def _ended(self, id: int) -> None:
        """One of its replies has."""
        call = self._calls[id]
        call.open -= 1
        if not call.open:
            del self._calls[id]

    def _take(self) -> None:
        """Moves new and ended calls from the inbox to the engine; waits for one if there is nothing else to do."""
        wait = not self._calls
        while True:
            try:
                call = self._inbox.get(block=wait)
            except queue.Empty:
                break
            wait = False
            if call is None:
                break
            if call.id is None and not call.left:
                self._add(call)
        for id in [id for id, call in self._calls.items() if call.left]:
            del self._calls[id]
            self._engine.cancel(id)

    def _add(self, call: _Call) -> None:
        try:
            call.id, call.open = self._engine.add(call.tokens, call.params), call.params.n
        except ValueError as error:
            call.put(error)
        else:
            self._calls[call.id] = call

    def _abandon(self) -> None:
        """Tells everybody who still waits, those in the inbox included."""
        calls = list(self._calls.values())
        while not self._inbox.empty():
            if call := self._inbox.get():
                calls.append(call)
        for call in calls:
            call.put(ReplicaLostError(f"the engine has stopped: {self._error!r}" if self._error else "shut down"))


def _joined(outputs: list[Output]) -> list[Output]:
    """Several outputs of one request as one for each of its replies."""
    replies: dict[int, list[Output]] = {}
    for output in outputs:
        replies.setdefault(output.index, []).append(output)
    return [
        replace(
            parts[-1],
            tokens=[token for part in parts for token in part.tokens],
            logprobs=[logprob for part in parts for logprob in part.logprobs],
            top=[top for part in parts for top in part.top],
        )
        for parts in replies.values()
    ]
