"""How a request comes in: what is refused by its key, its head, its size and its slowness, before a word is read.

Before us uvicorn refuses a head that is no HTTP, and one of over 64 KiB where it parses with h11 (httptools, its
default where installed, sets no limit; ours then holds).
"""

import asyncio
from math import ceil

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.service.keys import Key, Keys
from pipelines.service.protocol import ApiError
from pipelines.service.requests import MOST_BODY_BYTES

MOST_HEAD_BYTES = 1 << 16
STALL_S = 10  # without a byte of the body
BODY_S = 60  # for all of it
RETRY_S = 2  # where nothing better is known


class HeadLimit:
    """Refuses a request with a large head; what it asks is not looked at."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
            if size + sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEAD_BYTES:
                said = f"address and headers are larger than {MOST_HEAD_BYTES} bytes"
                await error_response(ApiError(431, said, code="head_too_large"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def read_body(request: Request) -> bytes:
    """The body of a JSON request.

    Raises ApiError: 415 if it says to be something else, 413 as soon as it is known to be too large, 408 when it
    stalls; ClientDisconnect.
    """
    _check_head(request)
    body = bytearray()
    clock = asyncio.get_running_loop().time
    end = clock() + BODY_S
    try:
        async with asyncio.timeout(STALL_S) as patience:
            async for piece in request.stream():
                body += piece
                if len(body) > MOST_BODY_BYTES:
                    raise _too_large()
                patience.reschedule(min(clock() + STALL_S, end))
    except TimeoutError:
        said = f"the body did not come: {STALL_S} s without a byte, or {BODY_S} s in all"
        raise ApiError(408, said, code="body_timeout") from None
    return bytes(body)


def asker(request: Request, keys: Keys | None) -> Key | None:
    """Whose key the request has; None where everybody may ask. Raises ApiError 401."""
    if keys is None:
        return None
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        said = "this service wants a key: send the header `Authorization: Bearer KEY`"
        raise ApiError(401, said, code="invalid_api_key")
    found = keys.find(key.strip())
    if found is None:
        raise ApiError(401, "the key is not known here; ask whoever runs the service", code="invalid_api_key")
    return found


async def left(request: Request) -> None:
    """Returns when the client has gone. Only after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's shape. Where a body may be on its way that nobody reads, the connection ends with it."""
    headers = {"Connection": "close"} if error.status in (408, 413, 415, 431) else {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(max(1, ceil(error.retry_after_s or RETRY_S)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


def _check_head(request: Request) -> None:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        said = f"content-type is {kind!r:.80}; it must be application/json"
        raise ApiError(415, said, code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        said = f"content-encoding is {coding!r:.80}; it must be left out"
        raise ApiError(415, said, code="unsupported_media_type")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise ApiError(400, f"content-length is {length!r:.80}; it must be a number of bytes")
    if len(length) > 18 or int(length) > MOST_BODY_BYTES:
        raise _too_large()


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MOST_BODY_BYTES} bytes", code="request_too_large")
