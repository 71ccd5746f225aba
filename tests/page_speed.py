"""Seconds from Enter to so many tokens in the chat page of a running service, in headless Chromium.

python -m tests.page_speed URL [--tokens 50] [--runs 15]

Replies end where their limit is, so a high temperature: a small model's own answers are shorter than that.
"""

import argparse
import json
import statistics

from tests import browser
from tests.chat_page import visit

SETTINGS = """((name, value) => {
  const field = document.getElementById(name);
  field.value = value;
  for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, {bubbles: true}));
})(%s, %s)"""
WATCH = """
addEventListener("keydown", event => { if (event.key === "Enter") watch(performance.now()); }, true);
function watch(pressed) {
  window.took = null;
  const ended = document.querySelectorAll(".anew").length;
  requestAnimationFrame(function look() {
    if (document.querySelectorAll(".anew").length > ended) window.took = performance.now() - pressed;
    else requestAnimationFrame(look);
  });
}
0
"""


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    times: list[float] = []
    asked = 0
    with browser.page() as page:
        page.look()
        visit(page, args.url)
        for name, value in (("max-tokens", args.tokens), ("temperature", 1.6)):
            page.run(SETTINGS % (json.dumps(name), json.dumps(str(value))))
        page.run(WATCH)
        while len(times) < args.runs and asked < 20 * args.runs:
            asked += 1
            page.run("document.getElementById('question').focus()")
            page.type(f"Tell me about number {asked}.")
            page.press("Enter")
            page.wait("!!window.took")
            said = str(page.run("document.querySelector('#chat > article:last-of-type').innerText"))
            if f"{args.tokens} tokens," in said:  # it did not end by itself
                times.append(page.run("window.took") / 1000)
    told = {"p50": statistics.median(times), "max": max(times), "first": times[0]} if times else None
    print(json.dumps({"bench": "page", "tokens": args.tokens, "runs": len(times), "asked": asked, "seconds": told}))


if __name__ == "__main__":
    main()
