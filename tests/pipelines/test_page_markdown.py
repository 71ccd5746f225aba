"""The chat page's own Markdown, in a real browser: against markdown-it, against itself in pieces, and against bombs."""

import json
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from pipelines.service.web import make_app
from tests import browser
from tests.serving import CARD, ByteVocabulary, Scripted, running

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed")

RENDER = """
import('/page/markdown.js').then(({ Markdown }) => {
  const draw = (text, size) => {
    const root = document.createElement('div');
    const markdown = new Markdown(root);
    for (let at = 0; at < text.length; at += size) { markdown.push(text.slice(at, at + size)); markdown.preview(); }
    markdown.end();
    return root;
  };
  const depth = (node) => [...node.children].reduce((most, child) => Math.max(most, 1 + depth(child)), 0);
  window.rendered = (text, size) => draw(text, size).innerHTML;
  window.measured = (text, size) => {
    const began = performance.now();
    const root = draw(text, size);
    return [performance.now() - began, depth(root), root.querySelectorAll('*').length];
  };
})
"""
SAMPLES = [
    "one\n\ntwo\nlines",
    "# A\n## B *c*\n### D ###\n#### E\n#not a head",
    "**bold** *italic* ***both*** ~~gone~~ `a*b*` ``a`b`` **bold *in* it**",
    "snake_case_name, 2 * 3 * 4, a*b*c, _it_ __st__ **open and *shut* it",
    "- a\n- b\n  - c\n    - d\n- e",
    "1. a\n2. b\n   - c\n   - d\n3. e\n\nafter",
    "7) a\n8) b",
    "- a\n\n  more of a\n- b",
    "* a\n* b\n\ntext\n\n- c",
    "> quoted\n> more\n>\n> second\n\nout",
    "> a\n> > b\nlazy",
    "> - a\n> - b",
    "```python\nx = 1\n\n\ny = `2`\n```\nafter",
    "~~~\n```\n~~~",
    "````\n```\n````",
    "- a\n  ```\n  code\n  ```\n- b",
    "```\nnever closed\n**not bold**",
    "a\n\n---\n\nb\n\n***\n\n_ _ _\n",
    "| a | b |\n|---|:-:|\n| 1 | **2** |\n| 3 | `4` |\n\nafter",
    "| a \\| b | c |\n|---|---|\n| short |",
    'see [it](https://a.example/x_y_(z)) and [*it*](http://b.example "title")',
    "<b>no tag</b> <script>x</script> <!-- no --> <img src=x onerror=y>",
    "\\*no\\* \\`no\\` 5 < 6 > 4 & 3",
    "text\n- list\ntext again\n\n1. a\n\n   b",
    "**a\nb** and *c\nd*",
    "Grüße 😀 日本語 **太字**",
]
BOMBS = {
    "stars": "*" * 100_000,
    "stars apart": "* " * 50_000,
    "stars and letters": "*a" * 50_000,
    "open bold": "**a " * 25_000,
    "brackets": "[" * 100_000,
    "links": "[a](" * 25_000,
    "open links": "[a](https://x(" * 7_000,
    "quotes": ">" * 10_000 + "x",
    "quotes apart": "> " * 10_000 + "x",
    "lists": "- " * 10_000 + "x",
    "deeper lists": "\n".join(" " * (2 * n) + "- x" for n in range(400)),
    "backticks": "".join("`" * n + "x" for n in range(440)),
    "backslashes": "\\" * 100_000,
    "hashes": "# " * 50_000,
    "hash and spaces": "#" + " " * 100_000 + "x",
    "spaces": (" " * 7_000 + "x\n") * 14,
    "fences": "```\n" * 25_000,
    "bars": "|" * 100_000,
    "table": "|a" * 20 + "|\n" + "|-" * 20 + "|\n" + "|\n" * 20_000,
    "items": "- a\n" * 25_000,
    "underscores": "_a_" * 30_000,
    "addresses": "https://" * 12_000,
    "one word": "x" * 1_000_000,
    "code of one line": "```\n" + "x" * 1_000_000,
    "code of many lines": "```\n" + "x\n" * 200_000,
}


class Outline(HTMLParser):
    """HTML as its tags, texts and addresses: less the page's frames around code, tables and hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._open: list[str] = []  # every open tag, "" where it is not told
        self._mute = 0  # how many open tags hide their text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "figcaption" or given.get("class") == "host" or self._mute:
            self._mute += 1
        dull = tag in ("figure", "figcaption", "div", "span", "button", "thead", "tbody", "br") or self._mute
        dull = dull or (tag == "p" and "li" in self._open)
        if tag not in ("br", "hr"):
            self._open.append("" if dull else tag)
        if not dull:
            self.parts.append(f"<{tag} {given['href']}>" if tag == "a" else f"<{tag}>")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("br", "hr"):
            return
        if self._mute:
            self._mute -= 1
        closed = self._open.pop()
        self.parts.append(f"</{closed}>" if closed else " " if tag == "p" else "")

    def handle_data(self, data: str) -> None:
        if not self._mute:
            self.parts.append(data)


def outline(html: str) -> str:
    parser = Outline()
    parser.feed(html)
    text = re.sub(r"\s+", " ", "".join(parser.parts))
    return re.sub(r" ?(</?(?!a\b|em|strong|code|del|s\b)[a-z0-9]+>) ?", r"\1", text).replace(
        " </code></pre>", "</code></pre>"
    )


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Page]:
    with browser.page() as opened, running(make_app(Scripted(""), ByteVocabulary(), CARD)) as url:
        opened.open(url)
        opened.run(RENDER)
        yield opened


def rendered(page: browser.Page, text: str, size: int = 1 << 30) -> str:
    return str(page.run(f"rendered({json.dumps(text)}, {size})"))


@pytest.mark.parametrize("text", SAMPLES)
def test_it_reads_markdown_as_markdown_it_does(page: browser.Page, text: str) -> None:
    reference = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    wanted = outline(reference.render(text))
    wanted = re.sub(r"(</?)h(\d)>", lambda hit: f"{hit[1]}h{min(6, int(hit[2]) + 2)}>", wanted).replace("<s>", "<del>")
    assert outline(rendered(page, text)) == wanted.replace("</s>", "</del>")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_text_in_pieces_looks_as_it_does_whole(page: browser.Page, size: int) -> None:
    chosen = random.Random(size)
    marks = [
        *"*_`#>|-~[]() \n\n\n",
        "**",
        "```",
        "\n- ",
        "\n1. ",
        "\n  - ",
        "\n> ",
        "\n|a|b|\n|-|-|\n",
        "word",
        "https://a.b",
        "](https://a.b)",
    ]
    texts = ["\n\n".join(SAMPLES), *("".join(chosen.choices(marks, k=120)) for _ in range(40))]
    for text in texts:
        assert rendered(page, text, size) == rendered(page, text), text


@pytest.mark.parametrize("name", BOMBS)
def test_no_text_takes_long_or_nests_deep(page: browser.Page, name: str) -> None:
    """A tenth of a second or less where it is linear; what is quadratic takes minutes."""
    milliseconds, depth, elements = page.run(f"measured({json.dumps(BOMBS[name])}, 4000)")
    assert milliseconds < 10_000
    assert depth < 30
    assert elements < 40_000


def test_long_text_is_whole_and_in_blocks(page: browser.Page) -> None:
    text = "".join(f"{number} " for number in range(20_000))
    for before in ("", "```\n"):
        got = rendered(page, before + text, 777)
        assert re.sub(r"<figcaption>.*?</figcaption>|<[^>]*>", "", got).strip() == text.strip()
        assert got.count('class="chunk"') == pytest.approx(len(text) / 4_000, rel=0.2)


@pytest.mark.parametrize(
    "text",
    [
        "[a](javascript:alert(1))",
        "[a](JaVaScRiPt:alert(1))",
        "[a](java\tscript:alert(1))",
        "[a](data:text/html,x)",
        "[a](vbscript:x)",
        "[a](//evil.example)",
        "[a](/v1/models)",
        "[a](file:///etc/passwd)",
        "[a](https://)",
        "[a](http://[)",
        "![a](javascript:alert(1))",
        "<a href='https://a.example'>a</a>",
        "&#60;a href=x&#62;",
        "[a]: https://a.example 'x'\n\n[a]".replace("https", "blob"),
    ],
)
def test_only_web_addresses_become_links(page: browser.Page, text: str) -> None:
    html = rendered(page, text)
    assert "<a " not in html.replace('<a href="https://a.example/"', "") or 'href="https://a.example' in html
    assert not re.search(r'(href|src)="(?!https?://)', html)
    assert "<img" not in html


def test_a_link_says_where_it_leads_and_cannot_reach_back(page: browser.Page) -> None:
    html = rendered(page, "[my.bank](https://my.bank@evil.example/x) ![cat](https://a.example/cat.png)")
    assert re.findall(r'<span class="host"> \((.*?)\)</span>', html) == ["evil.example", "a.example"]
    assert html.count('rel="noopener noreferrer nofollow"') == html.count('target="_blank"') == 2
    assert "<img" not in html
