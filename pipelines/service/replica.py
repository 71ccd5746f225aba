"""One copy of the model behind Ray Serve: tokens in, tokens out. Text and HTTP are the gateway's.

A gateway asks by `submit` and hears all its requests on one stream, `outputs`: a message a step. A message a token,
as a stream for each request would send it, costs Ray about 0.6 ms of Python, and a step of 32 tokens takes 30. With a
gateway of the same machine both go through pipes (pipe.py), and the stream only says that both are there.

deploy.py makes a deployment of it; the class itself needs Ray only to know its own name.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import serve

from nanochat.engine.stats import Stats
from pipelines.service.admission import Admission
from pipelines.service.bundle import Bundle
from pipelines.service.calls import Heard, Request
from pipelines.service.loading import load_engine, smoke
from pipelines.service.pipe import Address, Line
from pipelines.service.protocol import Answer, OverloadedError, ReplicaLostError
from pipelines.service.scaling import report
from pipelines.service.turns import take_short_turns
from pipelines.service.worker import Worker
from pipelines.spec import Capacity

IDLE_S = 2  # a stream on which nothing is open ends after this long, so that a replica can be stopped
SILENT_S = 10  # a caller that has asked and does not listen is gone after this long


@dataclass(eq=False)
class _Client:
    """A gateway: what it has asked for and not heard yet."""

    loop: asyncio.AbstractEventLoop
    waiting: list[Heard | tuple[int, Answer]] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    open: dict[int, tuple[int, Callable[[], None]]] = field(default_factory=dict)  # replies left, what cancels them
    listens: bool = False
    line: Line | None = None  # through which it asks and hears, where there is one
    left: bool = False  # nobody has its other end any more
    closed: bool = False  # it is forgotten
    lock: threading.Lock = field(default_factory=threading.Lock)  # of all this, but `news`, which is the loop's

    def put(self, message: Sequence[Heard]) -> None:
        """As Sink.put. The engine's thread itself writes to the line: the gateway works while it prepares a step."""
        with self.lock:
            for number, item in message:
                if number not in self.open:
                    continue  # cancelled since
                self.waiting.append((number, item))
                left, cancel = self.open[number]
                left = 0 if isinstance(item, Exception) else left - (item.finish is not None)
                if left:
                    self.open[number] = left, cancel
                else:
                    del self.open[number]
            self.tell()

    def tell(self) -> None:
        """Passes on what waits. For who has the lock."""
        if self.waiting and self.line:
            try:
                self.line.say(self.waiting)
            except BrokenPipeError:
                self.left = True
            self.waiting = []
        if self.waiting or self.left:
            self.loop.call_soon_threadsafe(self.news.set)

    @property
    def idle(self) -> bool:
        """It has nothing more to hear."""
        with self.lock:
            return not (self.open or self.waiting or (self.line and self.line.busy))

    def cancel(self, number: int) -> None:
        with self.lock:
            call = self.open.pop(number, None)
        if call:
            call[1]()


class Replica:
    """Loads a bundle and runs one engine in a thread. Raises RuntimeError where the model says nothing sane."""

    def __init__(self, bundle: Bundle, capacity: Capacity) -> None:
        take_short_turns()  # the threads of the engine are begun after it
        engine = load_engine(bundle.files, bundle.dtype, capacity)
        smoke(engine)
        self._bundle = bundle
        self._admission = Admission(
            places=capacity.max_batch,
            kv_tokens=capacity.kv_tokens,
            step_tokens=capacity.step_tokens,
            max_wait_s=capacity.max_wait_s,
            max_queued_tokens=capacity.max_queued_tokens,
        )
        self._slots = capacity.max_batch
        self._worker = Worker(engine, self._admission)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._clients: dict[str, _Client] = {}

    async def submit(self, replica: str, client: str, request: Request, refused: frozenset[str]) -> Answer:
        """Takes a request of a gateway, which then hears of it under its number. Raises ReplicaLostError.

        replica: where the gateway wants it; refused: which had no room for it. The router reads both, and another
        replica may be asked as well.
        """
        asker = self._client(client)
        with asker.lock:
            answer = self._take(asker, request)
        if not asker.listens:
            asker.loop.call_later(SILENT_S, self._forget_the_deaf, client)
        return answer

    async def outputs(
        self, replica: str, client: str, address: Address | None = None
    ) -> AsyncGenerator[list[Any], None]:
        """All that the gateway's requests hear. Ends when none is open; its end cancels those that are.

        address: of a line that takes it instead, and nothing is yielded, where this process can open it. The first
        message there is empty: from then on the gateway may ask through it, and hears an Answer or what went wrong.
        """
        if replica != self._name:
            raise ReplicaLostError(f"replica {replica} is gone")
        asker = self._client(client)
        line = Line.at(address, lambda request: self._asked(asker, request))
        try:
            if line:
                line.say([])
            with asker.lock:
                asker.listens, asker.line, asker.left = True, line, False
                asker.tell()
            while not asker.left:
                try:
                    async with asyncio.timeout(IDLE_S):
                        await asker.news.wait()
                except TimeoutError:
                    if asker.idle:
                        return
                    continue
                asker.news.clear()
                with asker.lock:
                    message, asker.waiting = asker.waiting, []
                if message:
                    yield message
        finally:
            if asker.line is line:  # else a newer stream has taken over
                self._forget(client)
            if line:
                line.close()

    async def cancel(self, replica: str, client: str, number: int) -> None:
        """The gateway's reader of this request has left."""
        if client in self._clients:
            self._clients[client].cancel(number)

    def bundle(self, replica: str) -> Bundle:
        """What it serves."""
        return self._bundle

    def stats(self) -> Stats:
        """The engine's load."""
        return self._worker.load()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks this every second; scaling.py reads it."""
        admission = self._admission
        return report(
            self._worker.load(),
            slots=self._slots,
            tokens_waiting=admission.waiting_tokens,
            admitted=admission.admitted,
            refused=admission.refused,
        )

    def check_health(self) -> None:
        """Serve asks this every few seconds and replaces the replica if it raises."""
        self._worker.check()

    def _take(self, asker: _Client, request: Request) -> Answer:
        """For who has its lock: the engine's first word must not come before the answer. Raises ReplicaLostError."""
        number, params = request.number, request.params
        try:
            cancel = self._worker.submit(asker, number, request.tokens, params, admitted=request.admitted)
        except OverloadedError as error:
            return Answer(self._name, error)
        asker.open[number] = params.n, cancel
        return Answer(self._name)

    def _asked(self, asker: _Client, request: Request) -> None:
        """Through the line."""
        with asker.lock:
            try:
                asker.waiting.append((request.number, self._take(asker, request)))
            except ReplicaLostError as error:
                asker.waiting.append((request.number, error))
            asker.tell()

    def _client(self, name: str) -> _Client:
        if name not in self._clients:
            self._clients[name] = _Client(asyncio.get_running_loop())
        return self._clients[name]

    def _forget(self, client: str) -> None:
        if asker := self._clients.pop(client, None):
            with asker.lock:
                asker.line, asker.closed = None, True
            for number in list(asker.open):
                asker.cancel(number)

    def _forget_the_deaf(self, client: str) -> None:
        if client in self._clients and not self._clients[client].listens:
            self._forget(client)
