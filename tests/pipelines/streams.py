"""A service of OpenAI's shape whose every byte and delay is scripted, on raw sockets: nothing frames for it."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Parts = list[tuple[float, bytes]]  # seconds to wait, then bytes to send


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def piece(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage(read: int, drawn: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": read, "completion_tokens": drawn}})


DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def whole(data: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n{more}\r\n".encode() + data


def stream(body: dict[str, Any], first_s: float = 0.0, gap_s: float = 0.0) -> Parts:
    """As many tokens as were asked for, one an event."""
    count = body["max_tokens"]
    parts = [
        (first_s if n == 0 else gap_s, chunk(piece(" ab", "length" if n == count - 1 else None))) for n in range(count)
    ]
    return [(0.0, HEAD), *parts, (0.0, chunk(usage(len(body["prompt"]), count) + DONE) + b"0\r\n\r\n")]


@dataclass
class Fake:
    """Answers the n-th question with `answer(n, body)`; what is sent last may be None: then it hangs up."""

    answer: Callable[[int, dict[str, Any]], Parts] = lambda number, body: stream(body)
    models: tuple[str, ...] = ("fake",)
    hang_up: bool = False  # after each answer
    asked: list[dict[str, Any]] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # when
    connections: int = 0
    now: int = 0
    most: int = 0  # questions at once

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                sizes = [
                    line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
                ]
                data = await reader.readexactly(int(sizes[0])) if sizes else b""
                self.now += 1
                self.most = max(self.most, self.now)
                for delay_s, part in self._parts(head, data):
                    if delay_s:
                        await asyncio.sleep(delay_s)
                    writer.write(part)
                    await writer.drain()
                self.now -= 1
                if self.hang_up:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def _parts(self, head: bytes, data: bytes) -> Parts:
        if head.startswith(b"GET /v1/models"):
            return [(0, whole(json.dumps({"data": [{"id": name} for name in self.models]}).encode()))]
        body = json.loads(data)
        if not body.get("stream"):
            return [(0, whole(b'{"choices": [{"text": "a"}]}'))]
        self.at.append(time.perf_counter())
        self.asked.append(body)
        return self.answer(len(self.asked) - 1, body)


@contextmanager
def faking(fake: Fake) -> Iterator[str]:
    """Serves it in a thread; yields its address."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(fake.handle, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
