"""What a reader can do in the chat page, in a real browser over a scripted backend."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from fastapi import Response
from fastapi.responses import StreamingResponse

from pipelines.service.protocol import ReplicaLostError
from tests import browser
from tests.chat_page import (
    DONE,
    LAST,
    ask,
    busy,
    cut_off,
    press_button,
    prompts,
    refusing,
    said,
    service,
    set_field,
    shown,
    visit,
)
from tests.serving import CARD, Scripted, running, wait_until

BEFORE = "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}"  # the button to the version before
pytestmark = [
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.usefixtures("no_complaint"),
]


# ---- asking, stopping, branching


def test_an_answer_comes_as_it_is_made(page: browser.Page) -> None:
    backend = Scripted("**Yes**, `it` is. 😀", piece=2)
    with running(service(backend)) as url:
        visit(page, url)
        ask(page, "Is it so?")
        assert shown(page) == ["Is it so?", "Yes, it is. 😀"]
        assert page.run(f"{LAST}.querySelector('strong').textContent") == "Yes"
        assert said(page).startswith(f"{len(backend.reply.encode()) + 1} tokens, ")  # type: ignore[union-attr]
        assert "tokens/s, first after 0." in said(page)
        page.wait("document.getElementById('announcer').textContent.startsWith('**Yes**')")
        ask(page, "And now?")
        assert prompts(backend)[1] == "||Is it so?||**Yes**, `it` is. 😀||And now?||"


def test_tokens_stand_in_the_page_soon_after_they_were_made(page: browser.Page) -> None:
    """50 tokens that cost no time to make, from Enter to their frame; the best of five, for a busy machine."""
    with running(service(Scripted("word " * 10, piece=50))) as url:
        visit(page, url)
        took = []
        for number in range(1, 6):
            page.run(
                "window.took = new Promise(done =>"
                " document.getElementById('question').addEventListener('keydown', event => {"
                f" const look = () => document.querySelectorAll('.assistant').length === {number}"
                f" && {LAST}.innerText.length > 49 ? done(performance.now() - event.timeStamp)"
                " : requestAnimationFrame(look); look(); }, { once: true })); 0"
            )
            ask(page, "go")
            took.append(page.run("took"))
    assert min(took) < 500


def test_escape_stops_and_continue_goes_on_where_it_stopped(page: browser.Page) -> None:
    backend = Scripted("".join(f"{number} " for number in range(400)), piece=3, pause_s=0.01)
    with running(service(backend)) as url:
        visit(page, url)
        ask(page, "Go", until="document.querySelector('.assistant .body').innerText.length > 9")
        page.press("Escape")
        page.wait(DONE)
        assert said(page).endswith("stopped")
        before = shown(page)[1]
        assert 9 < len(before) < 1_400
        backend.pause_s = 0.0
        press_button(page, "Continue")
        page.wait(f"{DONE} && {LAST}.innerText.includes('399')")
        assert shown(page)[1] == str(backend.reply).strip()
        (first, second) = (params.seed for _, params in backend.asked)
        assert first == second is not None, "the same seed: so the same words again"
        assert prompts(backend)[0] == prompts(backend)[1]
    assert backend.closed == [True, False]


def test_an_answer_made_anew_is_another_version(page: browser.Page) -> None:
    backend = Scripted("first")
    with running(service(backend)) as url:
        visit(page, url)
        ask(page, "Go")
        backend.reply = "second"
        press_button(page, "Again")
        page.wait(f"{DONE} && {LAST}.innerText.includes('2/2')")
        assert shown(page) == ["Go", "second"]
        assert prompts(backend)[0] == prompts(backend)[1]
        assert backend.asked[0][1].seed != backend.asked[1][1].seed
        press_button(page, BEFORE)
        assert shown(page) == ["Go", "first"]
        ask(page, "More")
        assert "first" in prompts(backend)[2]
        assert "second" not in prompts(backend)[2]


def test_an_edited_question_begins_a_branch(page: browser.Page) -> None:
    backend = Scripted("yes")
    with running(service(backend)) as url:
        visit(page, url)
        ask(page, "one")
        ask(page, "two")
        press_button(page, "Edit", "document.querySelectorAll('.user')[0]")
        assert page.run("document.activeElement.value") == "one"
        page.type("not one")
        page.press("Enter")
        page.wait(f"{DONE} && document.querySelectorAll('article').length === 2")
        assert shown(page) == ["onenot one", "yes"]
        assert prompts(backend)[2] == "||onenot one||"
        press_button(page, BEFORE, "document.querySelectorAll('.user')[0]")
        assert shown(page) == ["one", "yes", "two", "yes"]
        press_button(page, "Edit", "document.querySelectorAll('.user')[1]")
        page.press("Escape")
        assert shown(page) == ["one", "yes", "two", "yes"]
        assert len(backend.asked) == 3


# ---- chats that stay


def test_chats_survive_a_reload_and_can_be_named_and_deleted(page: browser.Page) -> None:
    backend = Scripted("kept")
    titles = "[...document.querySelectorAll('#chats .title')].map(node => node.textContent)"
    with running(service(backend)) as url:
        visit(page, url)
        ask(page, "first chat")
        page.run("document.getElementById('new').click()")
        assert shown(page) == []
        ask(page, "second chat")
        visit(page, url)
        assert shown(page) == ["second chat", "kept"]
        assert page.run(titles) == ["second chat", "first chat"]
        press_button(page, "first chat", "document.getElementById('chats')")
        assert shown(page) == ["first chat", "kept"]
        ask(page, "more")
        assert prompts(backend)[-1] == "||first chat||kept||more||"
        press_button(page, "Rename", "document.querySelector('#chats li:has([aria-current])')")
        page.type("A name")
        page.press("Enter")
        assert page.run(titles) == ["A name", "second chat"]
        for name in ("Delete", "Sure?"):
            press_button(page, name, "document.querySelector('#chats li')")
        visit(page, url)
        assert page.run(titles) == ["second chat"]


def test_an_answer_that_a_reload_cut_off_is_kept_and_marked(page: browser.Page) -> None:
    with running(service(Scripted("a" * 500, pause_s=0.01))) as url:
        visit(page, url)
        ask(page, "Go", until="document.querySelector('.assistant .body').innerText.length > 9")
        page.run("window.dispatchEvent(new Event('pagehide')); 0")  # as when a tab is closed: nothing runs after it
        assert page.run("Object.entries(localStorage).some(([name, kept]) => kept.includes('aaaaaaa'))")
        visit(page, url)
        assert shown(page)[1].startswith("aaaaaaa")
        assert "The answer broke off before its end" in said(page)
        assert page.run(f"!!{LAST}.querySelector('.resume')")


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "null",
        "[]",
        '{"id":1}',
        '{"id":"a","title":"x","changed":1,"turns":[{"role":"user","text":"x","parent":0}],"tip":0}',
        '{"id":"a","title":"x","changed":1,"turns":[{"role":"system","text":"x","parent":null}],"tip":0}',
        '{"id":"a","title":"x","changed":1,"turns":[],"tip":7}',
    ],
)
def test_damaged_storage_does_not_break_the_page(page: browser.Page, damage: str) -> None:
    with running(service(Scripted("fine"))) as url:
        visit(page, url)
        ask(page, "whole")
        page.run(f"localStorage['nanochat.chat.bad'] = {json.dumps(damage)}")
        page.run("localStorage['nanochat.settings'] = '{\"seed\":['")
        visit(page, url)
        assert shown(page) == ["whole", "fine"]
        assert "1 damaged chat is" in page.run("document.getElementById('damaged').innerText")
        assert page.run("localStorage['nanochat.chat.bad']") == damage, "it is the reader's; it is not thrown away"
        ask(page, "again")


def test_a_full_storage_is_told_and_the_chat_goes_on(page: browser.Page) -> None:
    with running(service(Scripted("fine"))) as url:
        visit(page, url)
        page.run(
            "for (let size = 1 << 22, n = 0; size > 0; n += 1)"
            " try { localStorage['x' + n] = 'x'.repeat(size) } catch { size >>= 1 }"
        )
        ask(page, "Is there room?")
        assert "no room" in page.run("document.getElementById('status').innerText")
        assert shown(page) == ["Is there room?", "fine"]


# ---- settings, lineage


def test_settings_reach_the_service_and_are_remembered(page: browser.Page) -> None:
    backend = Scripted("ok")
    with running(service(backend)) as url:
        visit(page, url)
        ask(page, "plain")
        fields = {"temperature": 0.25, "top-p": 0.9, "top-k": 7, "max-tokens": 9, "seed": 77, "system": "Be brief."}
        for field, value in fields.items():
            set_field(page, field, value)
        visit(page, url)
        ask(page, "set")
        plain, given = (params for _, params in backend.asked)
        assert (plain.temperature, plain.top_p, plain.top_k) == (CARD.temperature, None, None)
        assert plain.max_tokens == CARD.max_reply_tokens
        assert (given.temperature, given.top_p, given.top_k, given.max_tokens, given.seed) == (0.25, 0.9, 7, 9, 77)
        assert "Be brief." in prompts(backend)[1]
        assert "Be brief." not in prompts(backend)[0]
        page.run("document.getElementById('reset').click()")
        ask(page, "reset")
        assert backend.asked[2][1].top_k is None


def test_a_setting_that_the_service_forbids_is_shown_before_it_is_asked(page: browser.Page) -> None:
    backend = Scripted("ok")
    with running(service(backend)) as url:
        visit(page, url)
        set_field(page, "max-tokens", CARD.max_reply_tokens + 1)
        ask(page, "x", until="document.getElementById('settings').open")
        assert page.run("document.activeElement.id") == "max-tokens"
        assert backend.asked == []


def test_the_models_lineage_is_shown(page: browser.Page) -> None:
    with running(service(Scripted("ok"))) as url:
        visit(page, url)
        page.click("#about-button")
        facts = page.run("document.getElementById('lineage').innerText")
        for fact in (
            CARD.lineage["address"],
            CARD.lineage["key"],
            "checkpoint/chat-fedcba9876543210",
            "abc1234",
            "val_bpb 1.234",
        ):
            assert fact in facts
        page.press("Escape")
        assert page.run("document.querySelector('dialog[open]')") is None


# ---- when something is wrong


def test_a_busy_service_is_waited_for_and_said_so(page: browser.Page) -> None:
    backend = Scripted("at last")
    with running(refusing(service(backend), [busy("1"), busy("1", 503)])) as url:
        visit(page, url)
        ask(page, "Go", until=f"{LAST}.innerText.includes('the service is busy; asking again in 1 s')")
        page.wait(DONE)
        assert shown(page) == ["Go", "at last"]
        assert len(backend.asked) == 1


def test_waiting_can_be_stopped(page: browser.Page) -> None:
    backend = Scripted("no")
    with running(refusing(service(backend), [busy("60")])) as url:
        visit(page, url)
        ask(page, "Go", until=f"{LAST}.innerText.includes('asking again in')")
        page.press("Escape")
        page.wait(DONE)
        assert said(page) == "stopped"
        assert backend.asked == []


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (busy(None), "busy with the questions of others"),
        (busy("86400"), "busy with the questions of others"),
        (busy(None, 401), "wants a valid key"),
        (busy(None, 413), "too large"),
        (busy(None, 500), "The service failed (500). It says: too many"),
        (Response("<html>gateway</html>", 502), "The service failed (502)."),
    ],
)
def test_an_error_is_told_in_words_and_can_be_tried_again(page: browser.Page, refusal: Response, words: str) -> None:
    backend = Scripted("ok")
    with running(refusing(service(backend), [refusal])) as url:
        visit(page, url)
        ask(page, "Go")
        assert words in said(page)
        assert page.run(
            f"getComputedStyle({LAST}.querySelector('.said')).color !== getComputedStyle(document.body).color"
        )
        page.run("document.querySelector('dialog[open]')?.close()")
        press_button(page, "Try again")
        page.wait(f"{DONE} && {LAST}.innerText.includes('ok')")
        ask(page, "next")
        assert prompts(backend)[1] == "||Go||ok||next||"


def test_a_question_that_was_never_answered_is_left_out(page: browser.Page) -> None:
    backend = Scripted("ok")
    with running(refusing(service(backend), [busy(None)])) as url:
        visit(page, url)
        ask(page, "refused")
        ask(page, "answered")
        assert prompts(backend) == ["||answered||"]


def test_a_service_that_is_gone_is_told(page: browser.Page) -> None:
    with running(service(Scripted("ok"))) as url:
        visit(page, url)
    ask(page, "Go", until="!!document.querySelector('.anew')")
    assert "The service does not answer" in said(page)


@pytest.mark.parametrize("error", [True, False])
def test_an_answer_that_broke_off_is_marked_and_can_be_continued(page: browser.Page, error: bool) -> None:
    backend = Scripted("Hello world", end=ReplicaLostError("killed")) if error else Scripted("Hello world, all")
    app = service(backend) if error else refusing(service(backend), [cut_off("Hello")])
    with running(app) as url:
        visit(page, url)
        ask(page, "Go")
        assert "broke off" in said(page)
        assert shown(page)[1].startswith("Hello")
        backend.end, backend.reply = 260, "Hello world, all"
        press_button(page, "Continue")
        page.wait(f"{DONE} && {LAST}.innerText.includes('all')")
        assert shown(page)[1] == "Hello world, all"
        assert "broke off" not in said(page)


def test_a_chat_that_is_too_long_can_go_on_without_its_beginning(page: browser.Page) -> None:
    backend = Scripted("ok")
    with running(service(backend)) as url:
        visit(page, url)
        ask(page, "a" * 60)
        ask(page, "b" * 60)
        assert "longer than the model can read" in said(page)
        press_button(page, "Ask without what stands above")
        page.wait(f"{DONE} && {LAST}.innerText.includes('ok')")
        assert prompts(backend)[1] == f"||{'b' * 60}||"
        assert "does not see" in page.run("document.querySelector('.cut').innerText")


def test_an_answer_cut_off_at_its_longest_can_go_on(page: browser.Page) -> None:
    backend = Scripted("one two", end=None)
    with running(service(backend)) as url:
        visit(page, url)
        set_field(page, "max-tokens", 7)
        ask(page, "Go")
        assert said(page).endswith("cut off at its longest")
        backend.reply, backend.end = "one two three", 260
        press_button(page, "Continue")
        page.wait(f"{DONE} && {LAST}.innerText.includes('three')")
        assert shown(page)[1] == "one two three"
        assert [params.max_tokens for _, params in backend.asked] == [7, CARD.max_reply_tokens]


def test_a_stream_that_turns_into_nonsense_is_left(page: browser.Page) -> None:
    async def endless() -> AsyncIterator[str]:
        try:
            yield "data: {nonsense\n\n"
            while True:
                await asyncio.sleep(0.01)
                yield ": more\n\n"
        finally:
            left.append(True)

    left: list[bool] = []
    stream = StreamingResponse(endless(), media_type="text/event-stream")
    with running(refusing(service(Scripted("")), [stream])) as url:
        visit(page, url)
        ask(page, "Go")
        assert "something that is no answer" in said(page)
        wait_until(left)
