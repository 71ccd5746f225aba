"""The HTTP face: OpenAI's chat completions, models, health and the chat page, over any Backend.

Knows no Ray: tests put an engine of the same process behind it. Settings of a request are checked in protocol.py.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from nanochat.chat import render_prompt
from nanochat.engine.sampler import SampleParams
from pipelines.service.protocol import (
    MAX_BODY_BYTES,
    ApiError,
    Ask,
    Backend,
    Limits,
    ReplicaLostError,
    no_such_model,
    parse,
    usage,
)
from pipelines.service.text import TextStream

HEALTH_TIMEOUT_S = 10
PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
# The page shows what a model wrote, so nothing but its own files may run or be loaded, and it talks to us alone.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

logger = logging.getLogger(__name__)


class Vocab(Protocol):
    """What the service needs of a vocabulary."""

    @property
    def special(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode_bytes(self, tokens: list[int]) -> bytes: ...

    def token_bytes(self) -> npt.NDArray[np.int32]: ...


@dataclass(frozen=True)
class Card:
    """What clients may know of the model that is served."""

    id: str
    created: int  # seconds since 1970
    context: int  # tokens
    max_reply_tokens: int
    temperature: float  # used where a request names none
    lineage: dict[str, Any]  # key, inputs, git commit, scores

    def shown(self) -> dict[str, Any]:
        """As `GET /v1/models/{id}` answers."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat-ray",
            "context_length": self.context,
            "max_reply_tokens": self.max_reply_tokens,
            "temperature": self.temperature,
            "lineage": self.lineage,
        }


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a reply."""

    text: str
    tokens: int  # drawn for it
    finish: str | None


class Service:
    """Answers chats: text to tokens, tokens to the backend, tokens to text."""

    def __init__(self, backend: Backend, vocab: Vocab, card: Card) -> None:
        self.backend, self.vocab, self.card = backend, vocab, card
        self.limits = Limits(card.id, card.max_reply_tokens, card.temperature)
        self._longest_token = int(vocab.token_bytes().max())  # bytes
        self._stop = tuple(sorted(vocab.special.values()))  # none of them is text, so each ends a reply

    def prompt(self, ask: Ask) -> list[int]:
        """Tokens of the chat. Raises ApiError 400 if they leave no room for a reply, without encoding a huge chat."""
        size = sum(len(message["content"].encode()) for message in ask.messages)
        if size > self._longest_token * self.card.context:
            raise self._too_long(f"at least {size // self._longest_token}")
        tokens = render_prompt(self.vocab, ask.messages)
        if len(tokens) >= self.card.context:
            raise self._too_long(str(len(tokens)))
        return tokens

    def _too_long(self, tokens: str) -> ApiError:
        said = (
            f"this model's context is {self.card.context} tokens and the messages have {tokens}; "
            f"shorten them to {self.card.context - 1} or fewer"
        )
        return ApiError(400, said, param="messages", code="context_length_exceeded")

    async def reply(self, prompt: list[int], ask: Ask) -> AsyncGenerator[Delta, None]:
        """The reply as it is made; the last piece has `finish`. Closing the generator cancels the request."""
        text = TextStream(ask.stop)
        async with aclosing(self.backend.generate(prompt, replace(ask.params, stop=self._stop))) as outputs:
            async for output in outputs:
                said = output.tokens[:-1] if output.finish == "stop" else output.tokens
                fresh = text.push(self.vocab.decode_bytes(said), last=output.finish is not None)
                finish = "stop" if text.stopped else output.finish
                yield Delta(fresh, len(output.tokens), finish)
                if finish:
                    return
        raise ReplicaLostError("the reply broke off")

    async def alive(self) -> None:
        """A real forward pass. Raises TimeoutError or what the backend raises."""
        prompt = [self.vocab.special["<|bos|>"]]
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            async with aclosing(self.backend.generate(prompt, SampleParams(1, temperature=0))) as outputs:
                async for _ in outputs:
                    pass


def make_app(backend: Backend, vocab: Vocab, card: Card) -> FastAPI:
    """The whole HTTP service over `backend`."""
    service = Service(backend, vocab, card)
    app = FastAPI(title="nanochat-ray", docs_url=None, redoc_url=None, openapi_url=None)
    _handle_errors(app)
    _serve_page(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        ask = parse(await _body(request), service.limits)
        prompt = await asyncio.to_thread(service.prompt, ask)
        if ask.stream:
            return await _stream(service, ask, prompt)
        return await _whole(service, ask, prompt)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card.shown()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name != card.id:
            raise no_such_model(name, card.id)
        return card.shown()

    @app.get("/health")
    async def health() -> JSONResponse:
        try:
            await service.alive()
        except (TimeoutError, ReplicaLostError) as error:
            said = str(error) or f"no replica answered within {HEALTH_TIMEOUT_S} s"
            return JSONResponse({"status": "down", "model": card.id, "why": said}, 503)
        return JSONResponse({"status": "ok", "model": card.id})

    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        said = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, said).body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        answer = _as_api_error(error)
        return JSONResponse(answer.body, answer.status)

    @app.exception_handler(ReplicaLostError)
    async def lost(request: Request, error: ReplicaLostError) -> JSONResponse:
        answer = _as_api_error(error)
        return JSONResponse(answer.body, answer.status, headers={"Retry-After": "2"})


def _serve_page(app: FastAPI) -> None:
    def file(name: str) -> Response:
        return Response((PAGE / name).read_bytes(), media_type=PAGE_TYPES[name], headers=PAGE_HEADERS)

    @app.get("/")
    async def index() -> Response:
        return file("index.html")

    @app.get("/page/{name}")
    async def asset(name: str) -> Response:
        if name not in PAGE_TYPES:
            raise HTTPException(404, "Not Found")
        return file(name)


async def _body(request: Request) -> bytes:
    """The request's body. Raises ApiError 413 as soon as it is known to be too large."""
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise too_large
    except ClientDisconnect as error:
        raise ApiError(400, "the connection ended before the body did") from error
    return bytes(body)


async def _whole(service: Service, ask: Ask, prompt: list[int]) -> JSONResponse:
    """The answer in one piece."""
    text, tokens, finish = "", 0, None
    async with aclosing(service.reply(prompt, ask)) as deltas:
        async for delta in deltas:
            text, tokens, finish = text + delta.text, tokens + delta.tokens, delta.finish
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    head = _head(service.card, "chat.completion")
    return JSONResponse({**head, "choices": [choice], "usage": usage(len(prompt), tokens)})


async def _stream(service: Service, ask: Ask, prompt: list[int]) -> Response:
    """The answer as server-sent events. What goes wrong before the first token is still a plain HTTP error."""
    deltas = service.reply(prompt, ask)
    try:
        first = await anext(deltas)
    except BaseException:
        await deltas.aclose()
        raise
    return _Events(_events(service.card, ask, len(prompt), first, deltas))


class _Events(StreamingResponse):
    """Server-sent events whose generator is closed when the client leaves, and so the request cancelled."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()  # starlette leaves that to the garbage collector


async def _events(
    card: Card, ask: Ask, prompt_tokens: int, first: Delta, rest: AsyncGenerator[Delta, None]
) -> AsyncGenerator[str, None]:
    head = _head(card, "chat.completion.chunk")
    if ask.include_usage:
        head["usage"] = None
    tokens = 0

    def event(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _event({**head, "choices": [choice]})

    async with aclosing(rest):
        try:
            yield event({"role": "assistant", "content": ""})
            async for delta in _chain(first, rest):
                tokens += delta.tokens
                if delta.text:
                    yield event({"content": delta.text})
                if delta.finish:
                    yield event({}, delta.finish)
        except Exception as error:
            yield _event(_as_api_error(error).body)  # and no [DONE]: the answer is not whole
            return
    if ask.include_usage:
        yield _event({**head, "choices": [], "usage": usage(prompt_tokens, tokens)})
    yield "data: [DONE]\n\n"


async def _chain(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


def _head(card: Card, kind: str) -> dict[str, Any]:
    """What every object of one answer has. The fingerprint is the bundle's key: with it a seed means the same."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": card.id,
        "system_fingerprint": card.lineage["key"],
    }


def _as_api_error(error: Exception) -> ApiError:
    """What went wrong while answering, as a client may see it; the details go to the log."""
    if isinstance(error, ReplicaLostError):
        return ApiError(503, f"the replica that was answering is gone ({error}); ask again", code="replica_lost")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the service failed while answering; its log says why", code="internal_error")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
