"""One engine in a thread of its own, asked from asyncio. Knows no HTTP and no Ray.

The thread alone touches the engine. A caller hears all its requests through one sink, a message a step: thirty-two
replies cost one wake-up of the caller, not thirty-two.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from pipelines.service.admission import Admission, Ticket
from pipelines.service.calls import Calls, Heard
from pipelines.service.protocol import ReplicaLostError

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where a caller hears of its requests."""

    closed: bool  # nobody is left to hear

    def put(self, message: Sequence[Heard]) -> None:
        """Called by the thread: a step waits for it."""


class LoopSink:
    """A function, called on the caller's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, hear: Callable[[Sequence[Heard]], None]) -> None:
        self._loop, self._hear = loop, hear
        self.closed = False

    def put(self, message: Sequence[Heard]) -> None:
        """As Sink.put."""
        try:
            self._loop.call_soon_threadsafe(self._hear, message)
        except RuntimeError:  # the loop is closed
            self.closed = True


@dataclass(eq=False, slots=True)
class _Call:
    """One request on its way to the thread and back."""

    sink: Sink
    number: int  # the caller's own
    tokens: list[int]
    params: SampleParams
    ticket: Ticket | None  # of its admission
    id: int | None = None  # in the engine
    open: int = 0  # replies that have not ended
    left: bool = False  # the caller is not interested any more


class Worker:
    """A Backend: runs the engine whenever there is a request, sleeps otherwise."""

    def __init__(self, engine: Engine, admission: Admission | None = None) -> None:
        self._engine, self._admission = engine, admission
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()  # None: close
        self._calls: dict[int, _Call] = {}
        self._stats = engine.stats()
        self._error: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, sink: Sink, number: int, tokens: list[int], params: SampleParams, *, admitted: bool = False
    ) -> Callable[[], None]:
        """Asks; the sink hears of it under `number`. Returns what cancels it.

        Raises OverloadedError, where there is an admission and it was not `admitted` before, and ReplicaLostError.
        """
        ticket = self._admission.admit(len(tokens), params.n, admitted=admitted) if self._admission else None
        call = _Call(sink, number, tokens, params, ticket)
        self._inbox.put(call)
        self.check()  # after put: a thread that ends later finds the call in the inbox

        def cancel() -> None:
            call.left = True
            if ticket:
                ticket.leave()
            self._inbox.put(call)  # wakes the thread, which then forgets it

        return cancel

    async def generate(
        self, tokens: list[int], params: SampleParams, *, admitted: bool = False
    ) -> AsyncGenerator[Output, None]:
        """As Backend.generate. Raises ValueError too."""
        calls = Calls()
        number = calls.open()
        sink = LoopSink(asyncio.get_running_loop(), calls.hear)
        cancel = self.submit(sink, number, tokens, params, admitted=admitted)
        try:
            async with aclosing(calls.outputs(number, params.n)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            cancel()

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
        now = time.monotonic()
        try:
            while not self._closed:
                waited_s = self._take()
                self._tell(self._engine.step())
                self._stats = self._engine.stats()
                if self._admission:
                    before, now = now, time.monotonic()
                    self._admission.stepped(self._stats, now - before - waited_s)
        except Exception as error:
            self._error = error
            logger.critical("the engine has failed", exc_info=error)
        finally:
            self._closed = True
            self._abandon()

    def _tell(self, outputs: list[Output]) -> None:
        """Every caller what a step has made for it."""
        messages: dict[Sink, list[Heard]] = {}
        for output in outputs:
            call = self._calls[output.id]
            said: Output | Exception = output
            if output.finish == "error":
                said = ReplicaLostError("the model's logits are not finite: its weights are broken")
            messages.setdefault(call.sink, []).append((call.number, said))
            if call.ticket:
                call.ticket.answered()
            if output.finish:
                self._ended(output.id)
        for sink, message in messages.items():
            sink.put(message)

    def _ended(self, id: int) -> None:
        """One of its replies has."""
        call = self._calls[id]
        call.open -= 1
        if call.ticket:
            call.ticket.ended()
        if not call.open:
            del self._calls[id]

    def _take(self) -> float:
        """Moves new and ended calls from the inbox to the engine; waits for one if there is nothing else to do.

        Returns how long it has waited, in seconds.
        """
        wait, began, waited_s = not self._calls, time.monotonic(), 0.0
        while True:
            try:
                call = self._inbox.get(block=wait)
            except queue.Empty:
                break
            if wait:
                wait, waited_s = False, time.monotonic() - began
            if call is None:
                break
            if call.id is None and not call.left:
                self._add(call)
        for id in [id for id, call in self._calls.items() if call.left or call.sink.closed]:
            if ticket := self._calls.pop(id).ticket:
                ticket.leave()
            self._engine.cancel(id)
        return waited_s

    def _add(self, call: _Call) -> None:
        try:
            call.id, call.open = self._engine.add(call.tokens, call.params), call.params.n
        except ValueError as error:
            if call.ticket:
                call.ticket.leave()
            call.sink.put([(call.number, error)])
        else:
            self._calls[call.id] = call

    def _abandon(self) -> None:
        """Tells everybody who still waits, those in the inbox included."""
        calls = list(self._calls.values())
        while not self._inbox.empty():
            if call := self._inbox.get():
                calls.append(call)
        for call in calls:
            lost = ReplicaLostError(f"the engine has stopped: {self._error!r}" if self._error else "shut down")
            call.sink.put([(call.number, lost)])
