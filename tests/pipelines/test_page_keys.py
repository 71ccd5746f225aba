"""The chat page in front of a service that wants keys: asked for once, kept by the tab, sent with every question."""

import pytest

from pipelines.service.keys import Keys, Limits, entry_of, make_key
from pipelines.service.web import make_app
from pipelines.yamlfile import read_yaml
from tests import browser
from tests.chat_page import READY, ask, shown
from tests.serving import CARD, ByteVocabulary, Scripted, running

pytestmark = [
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.usefixtures("no_complaint"),
]
ASKED = "document.getElementById('settings').open && document.activeElement.id === 'key'"


def test_a_key_is_asked_for_once_and_kept_by_the_tab(page: browser.Page) -> None:
    key = make_key()
    keys = Keys({"reader": Limits(**read_yaml(entry_of("reader", key)).data["reader"])})
    with running(make_app(Scripted("hello"), ByteVocabulary(), CARD, keys)) as url:
        page.open(url)
        page.wait(ASKED)
        page.type("nc-wrong")
        page.run("window.refused = new Promise(done => document.getElementById('settings').onclose = () => done(1)); 0")
        page.press("Enter")
        assert page.run("refused")
        page.wait(ASKED)
        page.type(key)  # what stood there is marked
        page.press("Enter")
        page.wait(READY)
        ask(page, "Hi")
        assert shown(page) == ["Hi", "hello"]
        page.open(f"{url}/?again")
        page.wait(READY)
        assert not page.run("document.getElementById('settings').open")
        assert page.run("sessionStorage.getItem('nanochat.key')") == key
        assert key not in page.run("JSON.stringify(localStorage)")
        page.run("sessionStorage.clear(); localStorage.clear()")


def test_no_field_for_a_key_where_none_is_wanted(page: browser.Page) -> None:
    with running(make_app(Scripted("hello"), ByteVocabulary(), CARD)) as url:
        page.open(url)
        page.wait(READY)
        page.click("#settings-button")
        assert page.run("document.getElementById('key').checkVisibility()") is False
        assert page.run("document.getElementById('seed').checkVisibility()") is True
