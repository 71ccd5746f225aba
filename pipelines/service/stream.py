"""Server-sent events to a client that may read slowly or leave.

Replies are made at the engine's speed, whoever reads. What the client has not taken waits here, MOST_HELD bytes at
most; a client that lets more pile up, or takes nothing for STUCK_S to twice that, loses its reply, and the engine its
request: an engine that waited for a reader would keep the blocks of the cache from everybody else.
What waits when the connection takes more is sent in one piece, so the first token goes at once and nothing is late.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from pipelines.service.answers import event
from pipelines.service.intake import left
from pipelines.service.protocol import ApiError

MOST_HELD = 768 << 10  # bytes; uvicorn holds up to two pieces more, and 1 MiB is promised
PIECE = 64 << 10  # bytes that are sent at a time
STUCK_S = 60

T = TypeVar("T")


class Events(StreamingResponse):
    """A stream of events. The generator is closed when the client leaves, and so the request cancelled."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__((), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._request, self._events = request, events
        self._waiting: deque[bytes] = deque()
        self._held = 0  # bytes that wait
        self._news = asyncio.Event()
        self._ended = False
        self._since: float | None = None  # when something was given to the connection that it has not taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(job) for job in (self._send(send), self._fill(), left(self._request))]
        sends, _, leaves = tasks
        try:
            done: set[asyncio.Task[None]] = set()
            while not done and not self._stuck():  # a timeout for each piece would cost a tenth of sending it
                done, _ = await asyncio.wait([sends, leaves], timeout=STUCK_S, return_when=asyncio.FIRST_COMPLETED)
            if sends.done():
                with suppress(OSError):  # the client has left
                    sends.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._events.aclose()  # if the task was cancelled before it began

    async def _fill(self) -> None:
        try:
            async with aclosing(self._events):
                async for data in self._events:
                    if self._held + len(data) > MOST_HELD:
                        said = f"the client reads too slowly: over {MOST_HELD} bytes of the answer waited for it"
                        self._put(event(ApiError(408, said, code="slow_reader").body))
                        return
                    self._put(data)
        finally:
            self._ended = True
            self._news.set()

    def _put(self, data: bytes) -> None:
        self._waiting.append(data)
        self._held += len(data)
        self._news.set()

    def _stuck(self) -> bool:
        return self._since is not None and time.monotonic() - self._since > STUCK_S

    async def _send(self, send: Send) -> None:
        async def give(message: Message) -> None:
            self._since = time.monotonic()
            await send(message)
            self._since = None

        await give({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while self._waiting or not self._ended:
            if not self._waiting:
                self._news.clear()
                await self._news.wait()
                continue
            pieces: list[bytes] = []
            size = 0
            while self._waiting and (not pieces or size + len(self._waiting[0]) <= PIECE):
                pieces.append(self._waiting.popleft())
                size += len(pieces[-1])
            await give({"type": "http.response.body", "body": b"".join(pieces), "more_body": True})
            self._held -= size
        await give({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_left(request: Request, job: Coroutine[Any, Any, T]) -> T:
    """What `job` returns. Raises ClientDisconnect, with `job` cancelled, if the client does not wait for it."""
    works, leaves = asyncio.create_task(job), asyncio.create_task(left(request))
    try:
        await asyncio.wait([works, leaves], return_when=asyncio.FIRST_COMPLETED)
        if not works.done():
            raise ClientDisconnect
        return works.result()
    finally:
        leaves.cancel()
        if not works.done():
            works.cancel()
            await asyncio.gather(works, return_exceptions=True)
