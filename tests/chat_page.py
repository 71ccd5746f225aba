"""What tests of the chat page share: questions to ask in it, and a service that refuses."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from pipelines.service.web import make_app
from tests import browser
from tests.serving import CARD, ByteVocabulary, Scripted

READY = "document.body.dataset.state === 'ready'"
DONE = f"{READY} && !!document.querySelector('article.assistant:last-of-type .anew')"
LAST = "document.querySelector('#chat > article:last-of-type')"


def service(backend: Scripted) -> FastAPI:
    return make_app(backend, ByteVocabulary(), CARD)


def refusing(app: FastAPI, answers: list[Response]) -> FastAPI:
    """`app`, but its first questions get `answers`."""

    @app.middleware("http")
    async def refuse(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        return answers.pop(0) if request.method == "POST" and answers else await go_on(request)

    return app


def busy(retry_after: str | None, status: int = 429) -> Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return JSONResponse({"error": {"message": "too many", "code": None}}, status, headers=headers)


def cut_off(text: str) -> Response:
    """A stream that ends without [DONE], as when the machine that sent it died."""

    async def events() -> AsyncIterator[str]:
        chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        yield f"data: {json.dumps(chunk)}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def ask(page: browser.Page, text: str, *, until: str = DONE) -> None:
    page.run("document.getElementById('question').focus()")
    page.type(text)
    page.press("Enter")
    page.wait(until)
    painted(page)


def visit(page: browser.Page, url: str) -> None:
    page.open(url)
    page.wait(READY)


def painted(page: browser.Page) -> None:
    """Until what has come is on the screen: a frame later."""
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")


def shown(page: browser.Page) -> list[str]:
    """The texts of the turns."""
    painted(page)
    return list(page.run("[...document.querySelectorAll('article > .body')].map(node => node.innerText.trim())"))


def said(page: browser.Page) -> str:
    return str(page.run(f"{LAST}.querySelector('.said').innerText"))


def press_button(page: browser.Page, name: str, inside: str = LAST) -> None:
    page.run(f"[...{inside}.querySelectorAll('button')].find(node => node.textContent === {json.dumps(name)}).click()")


def prompts(backend: Scripted) -> list[str]:
    """What the model was asked, special tokens as |."""
    return [bytes(token if token < 256 else 124 for token in tokens).decode() for tokens, _ in backend.asked]


def set_field(page: browser.Page, field: str, value: object) -> None:
    node = f"document.getElementById('{field}')"
    page.run(f"{node}.value = {json.dumps(str(value))}; {node}.dispatchEvent(new Event('input', {{bubbles: true}}))")
