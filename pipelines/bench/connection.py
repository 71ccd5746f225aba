"""A lean HTTP/1.1 client for streams of server-sent events: what a token costs here is taken from the engine.

One read of the socket has one time, whatever it holds. JSON is read only where it decides something: up to the first
event with text, and the last few of a reply; that every event between them holds text is taken for granted.
aiohttp and httpx do all that ours leaves out (redirects, cookies, compression), at several times the price.
"""

import asyncio
import json
import ssl
from array import array
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, cast

MOST_HEAD_BYTES = 1 << 16
MOST_SAID_BYTES = 1 << 20  # of an answer that is no stream
TAIL = 4  # events at a reply's end that are looked at: one without text, the usage, an error


class BrokenError(ConnectionError):
    """The connection ended, or what came is no HTTP. unheard: before a single byte of the answer came."""

    def __init__(self, said: str, *, unheard: bool = False) -> None:
        super().__init__(said)
        self.unheard = unheard


class _Chunked:
    """Takes the frames off a body with `Transfer-Encoding: chunked`."""

    def __init__(self) -> None:
        self.done = False
        self._rest = b""  # the beginning of a line
        self._left = 0  # bytes of the chunk that are still to come, its line break among them
        self._last = False

    def take(self, data: bytes) -> bytes:
        """What of the body is in `data`. ValueError if that is no chunk."""
        data, at, parts = self._rest + data, 0, []
        self._rest = b""
        while at < len(data):
            if self._left:
                taken = min(self._left, len(data) - at)
                parts.append(data[at : at + min(taken, max(0, self._left - 2))])
                self._left -= taken
                at += taken
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._rest = data[at:]
                break
            line, at = data[at:end], end + 2
            if self._last:  # trailers, then an empty line
                self.done = self.done or not line
                continue
            size = int(line.partition(b";")[0], 16)
            self._left, self._last = (size + 2 if size else 0), not size
        return b"".join(parts)


class _Plain:
    """A body of known length, or one that ends with its connection (None)."""

    def __init__(self, length: int | None) -> None:
        self._left = length
        self.endless = length is None
        self.done = length == 0

    def take(self, data: bytes) -> bytes:
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
            self.done = not self._left
        return data


class Stream:
    """An answer as it comes: the times of its events with text, and what it says at its end."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.times = array("d")
        self.heard = 0.0  # time of the last read
        self.done = False  # [DONE] came
        self.body = b""  # of an answer that is no stream of events
        self._rest = b""
        self._tail: deque[bytes] = deque(maxlen=TAIL)
        self._begun = False  # text has come
        self._wrong: ValueError | None = None  # an event that is no JSON

    def feed(self, now: float, data: bytes) -> None:
        """A part of the body that came now."""
        if self.status != 200:
            self.body = (self.body + data)[:MOST_SAID_BYTES]
            return
        self.heard = now
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            if line.startswith(b"data: [DONE]"):
                self.done = True
                continue
            self._tail.append(line)
            if self._begun:
                self.times.append(now)
            elif self._first_text(line):
                self._begun = True
                self.times.append(now)

    def end(self) -> list[dict[str, Any]]:
        """The last events; their times are forgotten where they hold no text. ValueError if one is no JSON."""
        if self._wrong is not None:
            raise self._wrong
        events = [_event(line) for line in self._tail]
        timed = events[-len(self.times) :] if self.times else []
        kept = [time for time, event in zip(self.times[-len(timed) :], timed, strict=True) if _text(event)]
        self.times[len(self.times) - len(timed) :] = array("d", kept)
        if not self.times and any(choice.get("finish_reason") for e in events for choice in e.get("choices") or ()):
            self.times.append(self.heard)  # its first token was its last, and no text
        return events

    def _first_text(self, line: bytes) -> bool:
        try:
            return _text(_event(line))
        except ValueError as error:
            self._wrong = error
            return False


class Connection(asyncio.Protocol):
    """One connection; one answer at a time."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._stream: Stream | None = None
        self._ended: asyncio.Future[None] | None = None
        self._head = b""
        self._body: _Chunked | _Plain | None = None
        self._keep = True
        self._heard = False

    def ask(self, request: bytes, stream: Stream) -> "asyncio.Future[None]":
        """Sends it. The future is done when the answer is whole; or raises BrokenError."""
        self._stream, self._head, self._body, self._heard = stream, b"", None, False
        self._ended = asyncio.get_running_loop().create_future()
        if self.closed or self._transport is None:
            self._break("the connection was closed")
        else:
            self._transport.write(request)
        return self._ended

    def close(self) -> None:
        """Now; an answer that is not whole is lost."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if isinstance(self._body, _Plain) and self._body.endless:
            self._finish()
        else:
            self._break(f"the connection was closed ({error or 'by the service'})")

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        self._heard = True
        if self._stream is None:
            self.close()  # nobody asked
            return
        try:
            if self._body is None:
                data = self._take_head(data, self._stream)
                if self._body is None:
                    return
            payload = self._body.take(data)
        except ValueError as error:
            self._break(f"the answer is no HTTP/1.1: {error}")
            self.close()
            return
        if payload:
            self._stream.feed(now, payload)
        if self._body.done:
            self._finish()

    def _take_head(self, data: bytes, stream: Stream) -> bytes:
        """What came behind the head, once that is whole."""
        head, blank, rest = (self._head + data).partition(b"\r\n\r\n")
        if not blank:
            self._head = head
            if len(head) > MOST_HEAD_BYTES:
                raise ValueError("its head has no end")
            return b""
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"it begins with {first[:40]!r}")
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        stream.status, stream.headers = int(status[:3]), headers
        self._keep = headers.get("connection", "").lower() != "close" and version != "HTTP/1.0"
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._body = _Chunked()
        else:
            length = headers.get("content-length")
            self._body = _Plain(None if length is None else int(length))
        return rest

    def _finish(self) -> None:
        self._stream = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        if not self._keep:
            self.close()

    def _break(self, said: str) -> None:
        self._stream = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(BrokenError(said, unheard=not self._heard))


class Pool:
    """Connections to one service; one that is idle is used again before another is made."""

    def __init__(self, host: str, port: int, tls: bool) -> None:
        self._where = host, port
        self._tls = ssl.create_default_context() if tls else None
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes, stream: Stream, sent: Callable[[], None]) -> None:
        """Asks, and waits for the whole answer. sent is called when the request is on its way.

        Raises BrokenError, or OSError if there is nobody. Where a connection that was idle turns out to be closed
        the request is sent again by another: the service cannot have seen it.
        """
        while True:
            reused = self._take()
            connection = reused or await self._connect()
            try:
                ended = connection.ask(request, stream)
                sent()
                await ended
            except BrokenError as error:
                if reused and error.unheard:
                    continue
                raise
            except BaseException:  # a timeout, Ctrl-C
                connection.close()
                raise
            if not connection.closed:
                self._idle.append(connection)
            return

    def close(self) -> None:
        """All that are idle."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, *self._where, ssl=self._tls)
        return connection


def _event(line: bytes) -> dict[str, Any]:
    event = json.loads(line[5:])
    if not isinstance(event, dict):
        raise ValueError(f"an event is {event!r:.40}")
    return event


def _text(event: dict[str, Any]) -> bool:
    """Whether it holds text of a reply."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            return True
    return False
