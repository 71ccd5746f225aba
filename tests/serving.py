"""A service without Ray for tests: a vocabulary of bytes, a scripted backend, a real engine, an HTTP server."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI

from nanochat.config import ModelConfig
from nanochat.engine.runner import Runner, make_runner
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from nanochat.model import GPT
from pipelines.service.protocol import Card

NAMES = "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"
END = 260  # <|assistant_end|>
LINEAGE = {
    "key": "0123456789abcdef",
    "address": "bundle/bundle-0123456789abcdef",
    "inputs": {"model": "checkpoint/chat-fedcba9876543210"},
    "commit": "abc1234",
    "scores": {"chat_report": {"val_bpb": 1.234}},
}
CARD = Card("tiny-chat", 1_700_000_000, 128, 64, 0.8, LINEAGE)


class ByteVocabulary:
    """One token a byte, then the nine special ones: every character beyond ASCII is cut by token borders."""

    def __init__(self) -> None:
        self.special = {f"<|{name}|>": 256 + number for number, name in enumerate(NAMES.split())}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return bytes(tokens)  # ValueError on a special token: it must never get here

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0] * 9, dtype=np.int32)


@dataclass
class Scripted:
    """A Backend that says what it was told to, in pieces, and remembers what became of each request."""

    reply: str | bytes
    piece: int = 1  # tokens at a time
    end: Exception | int | None = END  # int: that stop token; None: it ends with length
    pause_s: float = 0.0
    asked: list[tuple[list[int], SampleParams]] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)  # for each ended request: whether before its last token

    async def generate(
        self, tokens: list[int], params: SampleParams, *, admitted: bool = False
    ) -> AsyncGenerator[Output, None]:
        self.asked.append((tokens, params))
        data = self.reply.encode() if isinstance(self.reply, str) else self.reply
        script = [*data, *([self.end] if isinstance(self.end, int) else [])]
        whole = False
        try:
            for start in range(0, len(script), self.piece):
                await asyncio.sleep(self.pause_s)
                part = script[start : start + self.piece]
                last = start + self.piece >= len(script) and not isinstance(self.end, Exception)
                finish = ("stop" if isinstance(self.end, int) else "length") if last else None
                whole = last
                yield Output(0, part, finish=finish)
            if isinstance(self.end, Exception):
                raise self.end
        finally:
            self.closed.append(not whole)

    async def stats(self) -> list[Stats]:
        return []


def tiny_model(depth: int = 1, scale: float = 1.0) -> GPT:
    """Random weights, always the same; CARD's context and ByteVocabulary's size. scale: of the last layer's."""
    model = GPT(ModelConfig(depth=depth, context=CARD.context, head_dim=8, aspect=16), 265)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def tiny_runner(kv_tokens: int = 1024) -> Runner:
    """`tiny_model` on this processor."""
    model = tiny_model()
    weights = model.state_dict()
    return make_runner(model.config, model.vocab_size, weights, kv_tokens=kv_tokens, precision="fp32", threads=1)


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serves `app` on a free port of 127.0.0.1; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def sse(text: str) -> list[str]:
    """The data of each event of a stream."""
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


def wait_until(true: Sequence[object], seconds: float = 5) -> None:
    """Waits for a list to be filled by another thread."""
    end = time.monotonic() + seconds
    while not true:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def spoken(stream: str) -> str:
    """The answer that a whole stream of chat events makes."""
    *events, last = sse(stream)
    assert last == "[DONE]", stream
    return "".join(choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"])
