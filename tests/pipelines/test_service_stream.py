"""Streams to clients that read slowly, not at all, or leave; choices that come interleaved."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from pipelines.service import stream
from pipelines.service.web import make_app
from pipelines.service.worker import Worker
from tests.reference.generate import generate
from tests.serving import CARD, END, ByteVocabulary, Scripted, running, sse, tiny_model, tiny_runner, wait_until

HELLO = [{"role": "user", "content": "Hi"}]
PROMPT = [256, 257, *b"Hi", 258, 259]
VOCAB = ByteVocabulary()


class Choices(Scripted):
    """Says what it was told to, each piece with the number of its choice."""

    def __init__(self, pieces: list[tuple[int, str]], replies: int) -> None:
        super().__init__("")
        self.pieces, self.replies = pieces, replies

    async def generate(self, tokens: list[int], params: SampleParams) -> AsyncGenerator[Output, None]:
        self.asked.append((tokens, params))
        for index, text in self.pieces:
            yield Output(0, list(text.encode()), index=index)
        for index in range(self.replies):
            yield Output(0, [END], finish="stop", index=index)


def request(url: str, body: dict[str, Any]) -> socket.socket:
    """A connection that has asked and not read."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    data = json.dumps({"model": CARD.id, "messages": HELLO, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_choices_come_as_they_are_made() -> None:
    said = [(0, "a"), (1, "x"), (0, "b"), (2, "!"), (1, "y")]
    with running(make_app(Choices(said, 3), VOCAB, CARD)) as url:
        body = {"model": CARD.id, "messages": HELLO, "stream": True, "n": 3}
        events = sse(httpx.post(f"{url}/v1/chat/completions", json=body).text)
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert [(c["index"], c["delta"]["content"]) for c in choices if c["delta"].get("content")] == said
    assert sorted(c["index"] for c in choices if c["finish_reason"] == "stop") == [0, 1, 2]


def test_a_stop_string_ends_its_own_choice_only() -> None:
    said = [(0, "a"), (1, "xST"), (0, "b"), (1, "OPno"), (1, "never"), (0, "c")]
    with running(make_app(Choices(said, 2), VOCAB, CARD)) as url:
        body = {"model": CARD.id, "messages": HELLO, "n": 2, "stop": "STOP"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["abc", "x"]
    assert answer["usage"]["completion_tokens"] == 3 + 1 + 5, "what came behind the stop string was counted"


def test_a_client_that_does_not_read_loses_its_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MOST_HELD", 200_000)
    backend = Scripted("x" * 20_000, piece=50)  # 100 kB of events
    endless = Scripted("x" * 1_000_000, piece=50)  # 7 MB; the kernel keeps some
    for source, whole in ((backend, True), (endless, False)):
        with running(make_app(source, VOCAB, CARD)) as url:
            connection = request(url, {"stream": True})
            wait_until(source.closed, 60)
            data = b""
            while b"0\r\n\r\n" not in data[-10:]:
                data += connection.recv(65_536)
            connection.close()
        assert source.closed == [not whole]
        assert (b"[DONE]" in data) == whole
        assert (b'"code":"slow_reader"' in data) != whole
    assert len(data) < 4_000_000, "all that was said has waited"


def test_what_waits_for_a_slow_client_is_bounded() -> None:
    """What the stream holds itself, counted where it hands pieces on."""

    async def events() -> AsyncGenerator[bytes, None]:
        for _ in range(10_000):
            yield b"x" * 1_000

    async def never(_: Any) -> None:
        await asyncio.sleep(3600)

    async def receive() -> dict[str, str]:
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def held() -> int:
        from starlette.requests import Request

        answer = stream.Events(Request({"type": "http"}, receive), events())
        task = asyncio.create_task(answer({"type": "http"}, receive, never))
        await asyncio.sleep(0.5)
        size = sum(map(len, answer._waiting))
        task.cancel()
        return size

    assert stream.MOST_HELD - 1_000 <= asyncio.run(held()) <= stream.MOST_HELD + 1_000


def test_a_client_that_is_stuck_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STUCK_S", 0.3)
    monkeypatch.setattr(stream, "MOST_HELD", 1 << 30)
    backend = Scripted("x" * 1_000_000, piece=50, pause_s=0.0001)
    with running(make_app(backend, VOCAB, CARD)) as url:
        connection = request(url, {"stream": True})
        wait_until(backend.closed, 60)
        connection.close()
    assert backend.closed == [True]


def test_a_client_that_is_stuck_at_the_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """All was made long ago; what the connection does not take is the last word."""
    monkeypatch.setattr(stream, "STUCK_S", 0.1)

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"all"

    async def receive() -> dict[str, str]:
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if not message.get("more_body", True):
            await asyncio.sleep(3600)

    async def run() -> None:
        from starlette.requests import Request

        async with asyncio.timeout(5):
            await stream.Events(Request({"type": "http"}, receive), events())({"type": "http"}, receive, send)

    asyncio.run(run())


@pytest.mark.parametrize("when", ["not streamed", "streamed", "before the first token"])
def test_a_client_that_leaves_frees_its_blocks_in_half_a_second(when: str) -> None:
    class Slow(Engine):
        def step(self) -> list[Output]:
            time.sleep(0.05 if self._open else 0)
            return super().step()

    worker = Worker(Slow(tiny_runner(), max_batch=1))
    stop = tuple(VOCAB.special.values())
    long = (SampleParams(64, temperature=2, seed=seed, stop=stop) for seed in range(999))
    seed = next(params.seed for params in long if len(generate(tiny_model(), PROMPT, params)) == 64)
    asked = {"stream": when != "not streamed", "seed": seed, "temperature": 2, "max_tokens": 64}
    with running(make_app(worker, VOCAB, CARD)) as url:
        ahead = request(url, {**asked, "stream": True}) if when == "before the first token" else None
        connection = request(url, asked)
        want = (1, 1) if ahead else (1, 0)
        end = time.monotonic() + 5
        while (worker.load().num_requests_running, worker.load().num_requests_waiting) != want:
            assert time.monotonic() < end, "the request did not get to the engine"
            time.sleep(0.01)
        if when == "streamed":
            heard = b""
            while b"assistant" not in heard:  # the head may come in a packet of its own
                piece = connection.recv(4096)
                assert piece, f"the stream ended with {heard!r}"
                heard += piece
        left = time.monotonic()
        connection.close()
        while worker.load().num_requests_running + worker.load().num_requests_waiting > want[1]:
            assert time.monotonic() < left + 0.5, "it still has its place"
            time.sleep(0.01)
        if ahead:
            ahead.close()
    worker.close()
