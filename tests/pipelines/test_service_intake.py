"""Heads and bodies that are too large, too slow or of the wrong kind; every error has OpenAI's shape."""

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from pipelines.service import intake
from pipelines.service.requests import MOST_BODY_BYTES
from pipelines.service.web import make_app
from tests.serving import CARD, ByteVocabulary, Scripted, running

ASK = json.dumps({"model": CARD.id, "messages": [{"role": "user", "content": "Hi"}]}).encode()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(make_app(Scripted("ok"), ByteVocabulary(), CARD)) as address:
        yield address


def connected(url: str, head: str, body: bytes = b"") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(f"{head} HTTP/1.1\r\nHost: {host}\r\n".encode() + body)
    return connection


def heard(connection: socket.socket) -> str:
    """All until the other side closes."""
    data = b""
    while piece := connection.recv(65_536):
        data += piece
    return data.decode()


@pytest.mark.parametrize("drip", [0, 0.1], ids=["stalled", "dripping"])
def test_a_body_that_does_not_come_is_408_and_the_end(url: str, drip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "STALL_S", 0.5)
    monkeypatch.setattr(intake, "BODY_S", 1.5)
    began = time.monotonic()
    connection = connected(url, "POST /v1/chat/completions", b'Content-Length: 100\r\n\r\n{"mod')
    for _ in range(60 if drip else 0):
        time.sleep(drip)
        try:
            connection.sendall(b" ")
        except OSError:
            break
    with connection:
        answer = heard(connection)
    assert answer.startswith("HTTP/1.1 408 ")
    assert '"code":"body_timeout"' in answer
    assert time.monotonic() - began < 5
    assert (time.monotonic() - began > 1.4) == bool(drip), "bytes that come are not a stall"


def test_a_body_too_large_is_413_before_it_has_come(url: str) -> None:
    connection = connected(url, "POST /v1/completions", f"Content-Length: {64 << 20}\r\n\r\n".encode())
    with connection:
        answer = heard(connection)
    assert answer.startswith("HTTP/1.1 413 ")
    assert '"code":"request_too_large"' in answer


def test_the_largest_body_is_read(url: str) -> None:
    size = MOST_BODY_BYTES - len(ASK)
    assert httpx.post(f"{url}/v1/chat/completions", content=ASK + b" " * size).status_code == 200
    assert httpx.post(f"{url}/v1/chat/completions", content=ASK + b" " * (size + 1)).status_code == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json"}, 200),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({"Content-Encoding": "identity"}, 200),
        ({}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"X-Long": "x" * 40_000, "X-Too": "x" * 30_000}, 431),
    ],
)
def test_heads(url: str, headers: dict[str, str], status: int) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", content=ASK, headers=headers)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/a/b", 404),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", f"/v1/models/{CARD.id}", 405),
        ("GET", "/v1/completions", 405),
        ("GET", "/page/../web.py", 404),
        ("GET", "/page/..%2fweb.py", 404),
    ],
)
def test_what_is_not_there_is_told_in_the_same_shape(url: str, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, url + path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert status != 405 or answer.headers["allow"]
