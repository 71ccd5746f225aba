"""The load generator: asks a service of OpenAI's shape, and writes down when what came.

Lives in a process of its own (nanochat.bench.worker), so that its processor time can be told from the service's.
In an open loop a request is sent at its time whatever became of the others; how late that was is written down too.
"""

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from pipelines.bench.asked import Load, prompt_tokens, prompt_words
from pipelines.bench.connection import BrokenError, Pool, Stream
from pipelines.bench.outcome import Outcome, Reply

MOST_WAIT_S = 10.0  # of a client that was refused, whatever the service tells it
WAIT_S = 1.0  # where it tells nothing
SHOWN_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A service, and how it is asked."""

    url: str  # without /v1
    model: str
    vocabulary: int  # random ids are below
    chat: bool = False
    words: tuple[float, float] = (0.0, 1.0)  # tokens of an empty chat, tokens of a word
    key: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout_s: float = 120.0

    @property
    def path(self) -> str:
        """Where it is asked."""
        return urlsplit(self.url).path + ("/v1/chat/completions" if self.chat else "/v1/completions")

    def body(self, load: Load, number: int) -> bytes:
        """The JSON of a request."""
        one = load.nth(number)
        settings: dict[str, Any] = {
            "model": self.model,
            "max_tokens": one.new,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            settings["ignore_eos"] = True
        if self.chat:
            empty, each = self.words
            text = prompt_words(load, number, max(1, round((one.prompt - empty) / each)))
            settings["messages"] = [{"role": "user", "content": text}]
        else:
            settings["prompt"] = prompt_tokens(load, number, self.vocabulary)
        return json.dumps(settings, separators=(",", ":")).encode()

    def request(self, load: Load, number: int) -> bytes:
        """As it goes over the wire."""
        body = self.body(load, number)
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {urlsplit(self.url).netloc}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("latin-1") + body


class Client:
    """Many clients of one service."""

    def __init__(self, target: Target) -> None:
        signal.signal(signal.SIGINT, self._interrupt)
        self._target = target
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._replies: list[Reply] = []
        self._interrupted = False

    def pid(self) -> int:
        """Of this process; SIGINT to it ends the load that runs."""
        return os.getpid()

    def run(self, load: Load) -> Outcome:
        """The load, to the end of its last reply."""
        return asyncio.run(self._run(load))

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._interrupted = True
        for task in self._tasks:
            task.cancel()

    async def _run(self, load: Load) -> Outcome:
        where = urlsplit(self._target.url)
        tls = where.scheme == "https"
        self._pool = Pool(where.hostname or "", where.port or (443 if tls else 80), tls)
        self._replies, self._interrupted, self._loop = [], False, asyncio.get_running_loop()
        prepared = [] if load.clients else [self._target.request(load, n) for n in range(len(load.asked))]
        shown = asyncio.create_task(self._show()) if sys.stderr.isatty() else None
        cpu_s, self._began = _cpu_s(), time.perf_counter()
        try:
            window_s = await (self._closed(load) if load.clients else self._open(load, prepared))
        finally:
            wall_s, cpu_s = self._now(), _cpu_s() - cpu_s
            self._loop = None
            self._pool.close()
            if shown is not None:
                shown.cancel()
                sys.stderr.write("\r\x1b[K")
        return Outcome(
            replies=[reply for reply in self._replies if reply.wrong != "interrupted"],
            window_s=max(window_s, 1e-9),
            closed=load.clients is not None,
            cpu_s=cpu_s,
            wall_s=wall_s,
            interrupted=self._interrupted,
        )

    async def _closed(self, load: Load) -> float:
        """Seconds until the first client had nothing more to ask."""
        numbers = iter(range(sys.maxsize))
        ends: list[float] = []

        async def client() -> None:
            while load.more(number := next(numbers), now := self._now()):
                wait_s = await self._ask(load, number, now, self._target.request(load, number))
                rest_s = float("inf") if load.seconds is None else load.seconds - self._now()
                await asyncio.sleep(min(wait_s, max(0.0, rest_s)))
            ends.append(self._now())

        for _ in range(load.clients or 0):
            self._start(client())
        await self._all()
        if self._interrupted:
            return self._now()
        return load.seconds if load.seconds is not None and load.requests is None else min(ends)

    async def _open(self, load: Load, prepared: list[bytes]) -> float:
        """Seconds until the last reply ended."""

        async def send() -> None:
            for number, one in enumerate(load.asked):
                await asyncio.sleep(max(0.0, one.at_s - self._now()))
                self._start(self._one(load, number, prepared[number]))

        self._start(send())
        await self._all()
        return self._now()

    async def _one(self, load: Load, number: int, request: bytes) -> None:
        await self._ask(load, number, load.asked[number].at_s, request)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _all(self) -> None:
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                if not task.cancelled():
                    task.result()

    async def _ask(self, load: Load, number: int, due_s: float, request: bytes) -> float:
        """Asks and writes down what came. Returns the seconds for which a polite client then waits."""
        one, stream = load.nth(number), Stream()
        reply = Reply(one.prompt, one.new, due_s, sent_s=self._now())
        self._replies.append(reply)

        def sent() -> None:
            reply.sent_s = self._now()

        try:
            async with asyncio.timeout(self._target.timeout_s):
                await self._pool.exchange(request, stream, sent)
        except TimeoutError:
            reply.wrong = "timeout"
            reply.said = f"no whole reply within {self._target.timeout_s:g} s"
        except asyncio.CancelledError:
            reply.wrong = "interrupted"
            raise
        except BrokenError as error:
            reply.wrong, reply.said = "broken stream" if stream.status else "broken connection", str(error)
        except ConnectionRefusedError as error:
            reply.wrong, reply.said = "connection refused", str(error)
        except OSError as error:
            reply.wrong, reply.said = "cannot connect", str(error)
        else:
            self._read(reply, stream)
        finally:
            reply.end_s = self._now()
        return _wait_s(stream) if reply.wrong else 0.0

    def _read(self, reply: Reply, stream: Stream) -> None:
        """What a whole answer says."""
        if stream.status != 200:
            reply.wrong, reply.said = str(stream.status), _message(stream.body)
            return
        try:
            events = stream.end()
        except ValueError as error:
            reply.wrong, reply.said = "no JSON", str(error)
            return
        for event in events:
            if problem := event.get("error"):
                code = problem.get("code") or problem.get("type") if isinstance(problem, dict) else None
                reply.wrong, reply.said = f"error event {code or ''}".rstrip(), str(problem)[:200]
                return
        if not stream.done:
            reply.wrong, reply.said = "broken stream", "it ended without [DONE]"
            return
        if not stream.times:
            reply.wrong, reply.said = "no text", "the stream held neither text nor a reason why it ended"
            return
        reply.times = stream.times
        for place, moment in enumerate(stream.times):
            reply.times[place] = moment - self._began
        usage: dict[str, Any] = next((e["usage"] for e in reversed(events) if e.get("usage")), {})
        reply.tokens = int(usage.get("completion_tokens") or len(stream.times))
        reply.prompt = int(usage.get("prompt_tokens") or reply.prompt)

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(SHOWN_EVERY_S)
            failed = sum(reply.wrong is not None for reply in self._replies)
            done = sum(reply.end_s > 0 for reply in self._replies)
            said = f"{self._now():,.0f} s: {done} of {len(self._replies)} requests have ended, {failed} with an error"
            sys.stderr.write(f"\r{said}\x1b[K")
            sys.stderr.flush()

    def _now(self) -> float:
        return time.perf_counter() - self._began


def _message(body: bytes) -> str:
    """What an error says, in OpenAI's shape or in another."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return text[:200]


def _wait_s(stream: Stream) -> float:
    """As Retry-After asks."""
    try:
        return min(MOST_WAIT_S, max(0.0, float(stream.headers["retry-after"])))
    except (KeyError, ValueError):
        return WAIT_S


def _cpu_s() -> float:
    """Processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
