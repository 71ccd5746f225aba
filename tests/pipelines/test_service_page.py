"""The chat page in a real browser, over a scripted backend."""

from collections.abc import Iterator

import pytest

from pipelines.service.protocol import ReplicaLostError
from pipelines.service.web import make_app
from tests import browser
from tests.serving import CARD, ByteVocabulary, Scripted, running

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed")

HOSTILE = "Look:\n\n<img src=x onerror=alert(1)> `a<b`\n\n```html\n<script>window.broken = 1</script>\n```\n\nGrüße 😀"
DONE = "document.querySelectorAll('.again').length === 1 && running === null"
LAST = "document.querySelector('article:last-of-type')"


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Page]:
    with browser.page() as opened:
        yield opened


def test_an_answer_is_text_and_never_html(page: browser.Page) -> None:
    with running(make_app(Scripted(HOSTILE, piece=5), ByteVocabulary(), CARD)) as url:
        page.open(url)
        page.wait("model !== null")
        page.type("Show me")
        page.press("Enter")
        page.wait(DONE)
        assert (
            page.run(f"[...{LAST}.querySelectorAll('*')].map(n => n.tagName).join()")
            == "P,P,CODE,PRE,CODE,P,DIV,SPAN,BUTTON"
        )
        assert page.run(f"{LAST}.querySelector('pre').textContent") == "<script>window.broken = 1</script>"
        assert page.run(f"{LAST}.querySelectorAll('p')[2].textContent") == "Grüße 😀"
        assert page.run("typeof window.broken") == "undefined"
        assert page.run(f"{LAST}.querySelector('.note span').textContent").startswith(
            f"{len(HOSTILE.encode()) + 1} tokens, "
        )
        assert page.run("turns.map(turn => turn.content)") == ["Show me", HOSTILE]
    assert page.complaints == []


def test_settings_lineage_again_and_a_new_chat(page: browser.Page) -> None:
    backend = Scripted("yes")
    with running(make_app(backend, ByteVocabulary(), CARD)) as url:
        page.open(f"{url}/?ask=Is%20it%20so%3F")
        page.wait(DONE)
        assert page.run("document.title") == CARD.id
        page.run("document.getElementById('about-button').click()")
        shown = page.run("document.getElementById('lineage').innerText")
        for fact in (CARD.lineage["address"], "checkpoint/chat-fedcba9876543210", "abc1234", "val_bpb 1.234"):
            assert fact in shown
        for control, value in (("temperature", "0.25"), ("max-tokens", "9"), ("seed", "77")):
            page.run(f"document.getElementById('{control}').value = {value}")
        page.run("document.querySelector('.again').click()")
        page.wait(DONE)
        first, second = (params for _, params in backend.asked)
        assert backend.asked[0][0] == backend.asked[1][0], "the same question must be asked again"
        assert (first.temperature, first.max_tokens, first.seed) == (CARD.temperature, CARD.max_reply_tokens, None)
        assert (second.temperature, second.max_tokens, second.seed) == (0.25, 9, 77)
        page.run("document.getElementById('new').click()")
        assert page.run("turns.length + document.querySelectorAll('article').length") == 0
        page.run("document.getElementById('max-tokens').value = 10000")  # more than the service allows
        page.type("x")
        page.press("Enter")
        assert page.run("document.getElementById('settings').hidden") is False
        assert len(backend.asked) == 2


def test_escape_stops_an_answer_and_keeps_what_there_was(page: browser.Page) -> None:
    backend = Scripted("x" * 5_000, pause_s=0.01)
    with running(make_app(backend, ByteVocabulary(), CARD)) as url:
        page.open(f"{url}/?ask=Go")
        page.wait("turns.length && document.querySelector('article.assistant')?.innerText.length > 3")
        page.press("Escape")
        page.wait(DONE)
        assert page.run(f"{LAST}.querySelector('.note span').textContent") == "stopped"
        assert page.run("turns[1].content.length") < 5_000
    assert backend.closed == [True]


def test_a_lost_replica_is_told(page: browser.Page) -> None:
    with running(make_app(Scripted("Hel", end=ReplicaLostError("killed")), ByteVocabulary(), CARD)) as url:
        page.open(f"{url}/?ask=Go")
        page.wait(DONE)
        assert "is gone (killed); ask again" in page.run(f"{LAST}.querySelector('.wrong').textContent")
        assert page.run(f"{LAST}.querySelector('p').textContent") == "Hel"


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_follows_the_readers_colours(page: browser.Page, dark: bool) -> None:
    with running(make_app(Scripted(HOSTILE), ByteVocabulary(), CARD)) as url:
        page.look(browser.PHONE, dark=dark)
        page.open(f"{url}/?ask={'long' * 30}")
        page.wait(DONE)
        page.run("document.getElementById('about-button').click()")
        page.run("document.getElementById('settings-button').click()")
        assert page.run("document.documentElement.scrollWidth") <= browser.PHONE[0]
        light = int(page.run("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
        assert light < 64 if dark else light > 192
        page.look()


def test_the_keyboard_reaches_every_control(page: browser.Page) -> None:
    with running(make_app(Scripted("ok"), ByteVocabulary(), CARD)) as url:
        page.open(url)
        page.wait("model !== null")
        reached = set()
        for _ in range(12):
            page.press("Tab")
            reached.add(page.run("document.activeElement.id"))
        assert {"about-button", "settings-button", "new", "question", "send"} <= reached
        page.run("document.getElementById('settings-button').focus()")
        page.press("Space")
        assert page.run("document.getElementById('settings-button').getAttribute('aria-expanded')") == "true"
