"""Drives headless Chromium over the DevTools protocol: for tests of the chat page, and for the picture in README.

python -m tests.browser URL PICTURE.png [QUESTION] [--dark] [--phone]
"""

import argparse
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0"
)
DESKTOP, PHONE = (900, 760), (390, 780)
START_S, WAIT_S = 30, 30


class Page:
    """One open page. `complaints` holds every error of a script and every refusal of the browser so far."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._calls = 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def look(self, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
        """Size of the window, and the colours that the reader prefers."""
        phone = size[0] < 500
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self._call("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + WAIT_S
        while not self.run(condition):
            assert time.monotonic() < end, f"{condition} did not come true; the browser said: {self.complaints}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def click(self, selector: str, *, button: str = "left") -> None:
        """With the mouse, where a reader would see the element."""
        node = f"document.querySelector({json.dumps(selector)})"
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({node}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def allow_clipboard(self) -> None:
        self._call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])

    def press(self, key: str, *, shift: bool = False) -> None:
        """Enter, Escape, Tab or Space."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9, "Space": 32}[key]
        named = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        named["modifiers"] = 8 if shift else 0
        text = {"Enter": {"text": "\r"}, "Space": {"text": " "}}.get(key, {})
        self._call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", **named)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT_S))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == self._calls:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])


@contextmanager
def page() -> Iterator[Page]:
    """An empty page of a browser of its own, which ends with the block."""
    assert CHROMIUM, "no Chromium is installed"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, *SWITCHES.split(), f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_address(Path(folder, "DevToolsActivePort")), max_size=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            process.wait()


def _address(port_file: Path) -> str:
    """Of the first page's DevTools socket."""
    end = time.monotonic() + START_S
    while True:
        assert time.monotonic() < end, "Chromium did not start"
        time.sleep(0.05)
        if not port_file.exists() or not (lines := port_file.read_text().splitlines()):
            continue
        targets = httpx.get(f"http://127.0.0.1:{lines[0]}/json", trust_env=False).json()
        pages = [target for target in targets if target["type"] == "page"]
        if pages:
            return str(pages[0]["webSocketDebuggerUrl"])


def main() -> None:
    """Takes a picture of a chat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("picture", type=Path)
    parser.add_argument("questions", nargs="*")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--phone", action="store_true")
    args = parser.parse_args()
    with page() as browser:
        browser.look(PHONE if args.phone else DESKTOP, dark=args.dark)
        browser.open(args.url)
        browser.wait("document.body.dataset.state === 'ready'")
        for number, question in enumerate(args.questions, 1):
            browser.type(question)
            browser.press("Enter")
            browser.wait(
                f"document.querySelectorAll('.anew').length >= {number} && document.body.dataset.state === 'ready'"
            )
        browser.picture(args.picture)


if __name__ == "__main__":
    main()
