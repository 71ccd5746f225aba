"""How the chat page looks and is used: a phone, colours, the keyboard alone, scrolling."""

import pytest

from tests import browser
from tests.chat_page import DONE, LAST, ask, busy, painted, press_button, refusing, service, set_field, visit
from tests.serving import Scripted, running

pytestmark = [
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.usefixtures("no_complaint"),
]

LONG = (
    "word " * 30
    + "x" * 300
    + "\n\n```c\n"
    + "y" * 300
    + "\n```\n\n"
    + "|abcdef" * 20
    + "|\n"
    + "|-" * 20
    + "|\n"
    + "|b" * 20
    + "|\n"
)
RICH = """# Head

text **bold** `code` [a](https://a.example)

> quote

- item

```python
x = 1
```

|a|b|
|-|-|
|1|2|
"""
CONTRASTS = """
Promise.all(document.getAnimations().filter(it => it.transitionProperty).map(it => it.finished)).then(() => {
  const paint = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (colour, below) => {
    paint.fillStyle = `rgb(${below.join()})`; paint.fillRect(0, 0, 1, 1);
    paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (node) =>
    node ? rgb(getComputedStyle(node).backgroundColor, behind(node.parentElement)) : [255, 255, 255];
  const low = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if ((!own && !node.placeholder) || node.disabled || !node.checkVisibility({ visibilityProperty: true })) continue;
    const ground = behind(node);
    const colour = own ? getComputedStyle(node).color : getComputedStyle(node, '::placeholder').color;
    const [high, deep] = [light(rgb(colour, ground)), light(ground)].sort((a, b) => b - a);
    const contrast = (high + .05) / (deep + .05);
    if (contrast < 4.5) low.push(`${node.tagName}.${node.className} ${node.textContent.slice(0, 20)}: ${contrast}`);
  }
  return low;
})
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("chosen", ["", "light", "dark"])
def test_every_text_can_be_read_in_light_and_dark(page: browser.Page, dark: bool, chosen: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1, worked out from what the browser shows."""
    with running(refusing(service(Scripted(RICH)), [busy(None)])) as url:
        page.look(dark=dark)
        visit(page, url)
        set_field(page, "theme", chosen)
        assert page.run(CONTRASTS) == []
        ask(page, "question")  # refused: an error is shown
        assert page.run(CONTRASTS) == []
        press_button(page, "Try again")
        page.wait(f"{DONE} && !!{LAST}.querySelector('table')")
        page.run("document.getElementById('settings').showModal()")
        assert page.run(CONTRASTS) == []
        ground = int(page.run("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
        assert (ground < 64) == ((chosen or ("dark" if dark else "light")) == "dark")
        page.open(url)
        assert page.run("document.documentElement.dataset.theme ?? ''") == chosen, "the choice is remembered"


@pytest.mark.parametrize("width", [320, 360, 800, 2400])
def test_nothing_is_wider_than_the_screen(page: browser.Page, width: int) -> None:
    with running(service(Scripted(LONG))) as url:
        page.look((width, 640))
        visit(page, url)
        ask(page, "long" * 15)
        for script in (
            "0",
            "document.getElementById('about').showModal(); 0",
            "document.getElementById('about').close(); document.getElementById('settings').showModal(); 0",
            "document.getElementById('settings').close(); document.getElementById('chats-button').click(); 0",
            f"{LAST}.previousElementSibling.querySelector('.edit').click(); 0",
        ):
            page.run(script)
            assert page.run("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)") <= width
            assert page.run("(box => box.scrollWidth - box.clientWidth)(document.getElementById('scroller'))") == 0
        box = page.run(
            "(r => [r.left, r.right, r.bottom])(document.getElementById('question').getBoundingClientRect())"
        )
        assert 0 <= box[0] < box[1] <= width
        assert box[2] <= 640


def test_the_keyboard_alone_is_enough(page: browser.Page) -> None:
    focused = "document.activeElement.id || document.activeElement.textContent"

    def tab_to(name: str) -> None:
        for _ in range(40):
            if page.run(focused) == name:
                return
            page.press("Tab")
        raise AssertionError(f"{name} was not reached; now at {page.run(focused)}")

    backend = Scripted("```c\nx\n```", pause_s=0.0)
    with running(service(backend)) as url:
        visit(page, url)
        assert page.run(focused) == "question", "it can be written at once"
        page.type("one")
        page.press("Enter", shift=True)
        page.type("two")
        page.press("Enter")
        page.wait(DONE)
        assert page.run("document.querySelector('.user > .body').textContent") == "one\ntwo"
        assert page.run(focused) == "question"
        for name in (
            "new",
            "one two",
            "Rename",
            "Delete",
            "about-button",
            "settings-button",
            "Copy",
            "Edit",
            "Again",
            "question",
            "send",
        ):
            tab_to(name)
            outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"{name}: where the focus is must be seen"
        tab_to("settings-button")
        page.press("Space")
        assert page.run("document.getElementById('settings').open")
        page.press("Escape")
        assert page.run(focused) == "settings-button", "and back where it was"
        tab_to("Again")
        page.press("Enter")
        page.wait(f"{DONE} && {LAST}.innerText.includes('2/2')")
        backend.pause_s = 0.05
        backend.reply = "x" * 500
        tab_to("question")
        page.type("long one")
        page.press("Enter")
        page.wait("!document.getElementById('stop').hidden")
        tab_to("stop")
        page.press("Space")
        page.wait(DONE)
        assert page.run(focused) == "question", "the focus is not lost with the button"


def test_a_chat_is_named_for_those_who_hear_it(page: browser.Page) -> None:
    unnamed = (
        "[...document.querySelectorAll('button, input, select, textarea, pre[tabindex]')].filter(node => "
        "!node.textContent.trim() && !node.labels?.length && !node.getAttribute('aria-label'))"
        ".map(node => node.outerHTML)"
    )
    with running(service(Scripted(RICH))) as url:
        visit(page, url)
        ask(page, "question")
        press_button(page, "Edit", "document.querySelector('.user')")
        press_button(page, "Rename", "document.querySelector('#chats')")
        assert page.run(unnamed) == []
        assert page.run("document.getElementById('announcer').getAttribute('aria-live')") == "polite"
        assert "text **bold**" in page.run("document.getElementById('announcer').textContent")


def test_only_a_reader_at_the_end_is_taken_along(page: browser.Page) -> None:
    text = "".join(f"line {number}\n\n" for number in range(120))
    place = "document.getElementById('scroller').scrollTop"
    to_end = "(box => box.scrollHeight - box.clientHeight - box.scrollTop)(document.getElementById('scroller'))"
    with running(service(Scripted(text, piece=12, pause_s=0.02))) as url:
        visit(page, url)
        ask(page, "Go", until=f"{LAST}.innerText.includes('line 60')")
        assert page.run(to_end) < 60
        page.run(f"{place} = 100")
        page.wait(f"{LAST}.innerText.includes('line 90')")
        assert page.run(place) == 100
        page.click("#to-end")
        page.wait(f"{DONE} && {LAST}.innerText.includes('line 119')")
        painted(page)
        assert page.run(to_end) < 2
        assert page.run("document.getElementById('to-end').hidden")
