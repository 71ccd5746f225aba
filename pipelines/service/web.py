"""The HTTP face over any Backend: OpenAI's chat completions, completions, models; health, metrics, the chat page.

Knows no Ray: tests put an engine of the same process behind it. What a request may say is in requests.py, what it
hears in answers.py; openapi.py tells both to machines.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines.service.answers import ChatShape, Shape, TextShape, Tokens, event, usage
from pipelines.service.intake import HeadLimit, asker, error_response, read_body
from pipelines.service.keys import Keys
from pipelines.service.metrics_text import MEDIA_TYPE, Counted, answers_counter, exposition, turned_away_counter
from pipelines.service.openapi import document
from pipelines.service.parse import parse_chat, parse_completion
from pipelines.service.protocol import (
    ApiError,
    Ask,
    Backend,
    Card,
    OverloadedError,
    ReplicaLostError,
    no_such_model,
)
from pipelines.service.rates import Rates
from pipelines.service.replies import Delta, Service, Vocab
from pipelines.service.stream import Events, unless_left

SMALL_BODY_BYTES = 8 << 10  # is read and encoded at once; a larger one in another thread, so that streams go on
PAGE = Path(__file__).parent / "page"
PAGE_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGE_TYPES = {path.name: PAGE_KINDS[path.suffix] for path in PAGE.iterdir() if path.suffix in PAGE_KINDS}
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


@dataclass(frozen=True, slots=True)
class _Job:
    """A request that is ready to be answered."""

    ask: Ask
    prompts: list[list[int]]
    shape: Shape

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.ask.params.n

    @property
    def read(self) -> int:
        """Tokens of the prompts."""
        return sum(map(len, self.prompts))

    def most(self, context: int) -> int:
        """Tokens that its replies can have."""
        params = self.ask.params
        return params.n * sum(min(params.max_tokens, context - len(prompt)) for prompt in self.prompts)


def make_app(backend: Backend, vocab: Vocab, card: Card, keys: Keys | None = None) -> FastAPI:
    """The whole HTTP service over `backend`. keys: who may ask and how much; None: everybody, and any amount.

    Whoever has no key sees the page's files, the document and the health, and nothing that the model says.
    """
    service, registry = Service(backend, vocab, card), CollectorRegistry()
    app = FastAPI(title="nanochat-ray", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(HeadLimit)
    app.add_middleware(Counted, answers=answers_counter(registry))  # the last is outermost
    _handle_errors(app, turned_away_counter(registry))
    _serve_page(app)
    _serve_replies(app, service, keys)
    described = document(card, service.vocab_size, keyed=keys is not None)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        asker(request, keys)
        return {"object": "list", "data": [card.shown()]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        asker(request, keys)
        if name != card.id:
            raise no_such_model(name, card.id)
        return card.shown()

    @app.get("/openapi.json")
    async def openapi() -> dict[str, Any]:
        return described

    @app.get("/health")
    async def health() -> JSONResponse:
        try:
            await service.alive()
        except (TimeoutError, ReplicaLostError) as error:
            return JSONResponse({"status": "down", "model": card.id, "why": str(error)}, 503)
        except OverloadedError:
            pass  # said by an engine that is at work
        return JSONResponse({"status": "ok", "model": card.id})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        asker(request, keys)
        return Response(exposition(registry, card.id, await backend.stats()), media_type=MEDIA_TYPE)

    return app


def _serve_replies(app: FastAPI, service: Service, keys: Keys | None) -> None:
    tokens, rates = Tokens(service.vocab), Rates(time.monotonic)

    def chat(body: bytes) -> _Job:
        ask = parse_chat(body, service.card)
        return _Job(ask, [service.chat(ask)], ChatShape(service.card, tokens, ask.params.logprobs))

    def completion(body: bytes) -> _Job:
        ask = parse_completion(body, service.card)
        return _Job(ask, service.prompts(ask), TextShape(service.card, tokens, ask.params.logprobs))

    async def answer(request: Request, prepare: Callable[[bytes], _Job]) -> Response:
        key = asker(request, keys)
        body = await read_body(request)
        job = prepare(body) if len(body) <= SMALL_BODY_BYTES else await asyncio.to_thread(prepare, body)
        deltas = service.replies(job.prompts, job.ask)
        if key is not None:
            deltas = rates.metered(key, job.read, job.most(service.card.context), deltas)
        if job.ask.stream:
            response: Response = await _stream(request, job, deltas)
        else:
            response = JSONResponse(await unless_left(request, _whole(job, deltas)))
        if key is not None:
            response.headers.update(rates.headers(key))
        return response

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, completion)


def _handle_errors(app: FastAPI, turned_away: Counter) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        if error.status in (401, 429):
            turned_away.labels(error.code).inc()
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        said = f"{request.method} {request.url.path:.200}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, said).body, error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody hears it; nginx counts it so, and so do we

    @app.exception_handler(ReplicaLostError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(_as_api_error(error))


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


async def _whole(job: _Job, deltas: AsyncGenerator[Delta, None]) -> Any:
    """The answer in one piece."""
    choices: list[list[Delta]] = [[] for _ in range(job.choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            choices[delta.index].append(delta)
    return job.shape.whole(choices, job.read)


async def _stream(request: Request, job: _Job, deltas: AsyncGenerator[Delta, None]) -> Response:
    """The answer as server-sent events. What goes wrong before the first token is still a plain HTTP error."""
    first = await unless_left(request, _first(deltas))
    return Events(request, _events(job, first, deltas))


async def _first(deltas: AsyncGenerator[Delta, None]) -> Delta:
    try:
        return await anext(deltas)
    except BaseException:
        await deltas.aclose()
        raise


async def _events(job: _Job, first: Delta, rest: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
    head = job.shape.head(chunk=True)
    if job.ask.include_usage:
        head["usage"] = None
    drawn = 0
    async with aclosing(rest):
        try:
            for index in range(job.choices):
                for choice in job.shape.begin(index):
                    yield event({**head, "choices": [choice]})
            async for delta in _chain(first, rest):
                drawn += delta.tokens
                for choice in job.shape.pieces(delta):
                    yield event({**head, "choices": [choice]})
        except Exception as error:
            yield event(_as_api_error(error).body)  # and no [DONE]: the answer is not whole
            return
    if job.ask.include_usage:
        yield event({**head, "choices": [], "usage": usage(job.read, drawn)})
    yield b"data: [DONE]\n\n"


async def _chain(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


def _as_api_error(error: Exception) -> ApiError:
    """What went wrong while answering, as a client may see it; the details go to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ReplicaLostError):
        return ApiError(503, f"the replica that was answering is gone ({error}); ask again", code="replica_lost")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the service failed while answering; its log says why", code="internal_error")
