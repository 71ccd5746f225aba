"""What a model cannot do to the reader of the chat page: run something, fetch something, freeze it."""

import time

import pytest

from tests import browser
from tests.chat_page import DONE, LAST, ask, service, shown, visit
from tests.serving import Scripted, running

pytestmark = [
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.usefixtures("no_complaint"),
]

HOSTILE = """\
<script>window.broken = 1</script><img src=x onerror="window.broken = 1"><svg onload="window.broken = 1">

[click](javascript:window.broken=1) [me](data:text/html,<script>parent.broken=1</script>) ![x](x" onerror="broken=1)

<style>body { display: none }</style> <a style="position:fixed;inset:0" href="//evil.example">x</a>
<iframe srcdoc="<script>parent.broken=1</script>"></iframe> <base href="//evil.example/">
&lt;b&gt; &#x6a;avascript:

```html"><script>window.broken = 1</script>
</code></pre><script>window.broken = 1</script>
```

| <img src=x onerror=broken=1> | `</td>` |
|---|---|
| <b onclick="broken=1">x</b> | [y](vbscript:x) |

"""
CLICKS = """
window.delays = [];
document.getElementById('name').addEventListener('mousedown', (event) => {
  requestAnimationFrame(() => delays.push(performance.now() - event.timeStamp));
});
"""


@pytest.mark.parametrize("piece", [3, 10_000])
def test_what_a_hostile_model_writes_is_text(page: browser.Page, piece: int) -> None:
    with running(service(Scripted(HOSTILE, piece=piece))) as url:
        visit(page, url)
        ask(page, HOSTILE[:100])
        page.wait(f"{LAST}.querySelectorAll('td').length === 2")
        time.sleep(0.2)  # an image or script would be fetched by now
        assert page.run("typeof window.broken") == "undefined"
        assert (
            page.run("document.querySelectorAll('#chat :is(img, script, style, iframe, svg, base, a, b)').length") == 0
        )
        assert (
            page.run("document.querySelectorAll('#chat [style], #chat [onclick], #chat [href], #chat [src]').length")
            == 0
        )
        assert "<script>window.broken = 1</script>" in shown(page)[1]
        assert "&lt;b&gt; &#x6a;avascript:" in shown(page)[1], "an entity must stay as it was written"
        page.run(f"{LAST}.querySelector('.foot .copy').click()")
        page.wait(f"{LAST}.querySelector('.foot .copy').textContent === 'Copied'")
        assert page.run("navigator.clipboard.readText()") == HOSTILE
        page.run(f"{LAST}.querySelector('.code .copy').click()")
        page.wait(f"{LAST}.querySelector('.code .copy').textContent === 'Copied'")
        assert page.run("navigator.clipboard.readText()") == HOSTILE.split("```")[1].partition("\n")[2].rstrip("\n")


def test_the_page_cannot_make_html_of_text(page: browser.Page) -> None:
    """Even a mistake in our own code: the browser refuses it."""
    with running(service(Scripted(""))) as url:
        visit(page, url)
        done = page.run(
            "(() => { try { document.body.innerHTML = '<p>'; return 'made' } catch { return 'refused' } })()"
        )
        assert done == "refused"
        styled = "(node => (node.setAttribute('style', 'color: red'), getComputedStyle(node).color))(document.body)"
        assert page.run(styled) != "rgb(255, 0, 0)"
        page.run("0")
        assert page.complaints, "both refusals are told"
        page.complaints.clear()


@pytest.mark.parametrize("piece", [5_000, 400_000], ids=["in pieces", "in large ones"])
@pytest.mark.parametrize(
    "reply",
    [
        "x" * 1_000_000,
        "*" * 100_000,
        "> " * 10_000 + "x",
        "- " * 10_000,
        "```\n" + "y" * 300_000,
        "**a " * 50_000,
        "|a" * 20 + "\n" + "|-" * 20 + "\n" + "|b\n" * 20_000,
    ],
    ids=["one word of 1 MB", "stars", "quotes in quotes", "lists in lists", "open fence", "open bold", "table"],
)
def test_the_page_answers_a_click_while_it_shows(page: browser.Page, reply: str, piece: int) -> None:
    """Most clicks get their next frame within 200 ms, none waits for a second: the machine has other work, too."""
    backend = Scripted(reply, piece=piece, pause_s=0.005)
    with running(service(backend)) as url:
        visit(page, url)
        ask(page, "Go", until="document.querySelector('.assistant .body').textContent.length > 0")
        page.run(CLICKS)
        for _ in range(9):
            page.click("#name")
            time.sleep(0.05)
        page.wait("delays.length === 9")
        delays = sorted(page.run("delays"))
        assert delays[5] < 200
        assert delays[-1] < 1_000
        page.wait(f"{DONE} && {LAST}.querySelector('.body').textContent.length >= {len(reply) * 0.2}")
        assert page.run("document.querySelectorAll('*').length") < 60_000
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
