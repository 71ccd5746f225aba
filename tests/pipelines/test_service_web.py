"""The HTTP face over a scripted backend and over a real engine, without Ray, spoken to by httpx and by `openai`."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import openai
import pytest

from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from pipelines.service.protocol import ReplicaLostError
from pipelines.service.requests import MOST_BODY_BYTES
from pipelines.service.web import make_app
from pipelines.service.worker import Worker
from tests.reference.generate import generate
from tests.serving import CARD, ByteVocabulary, Scripted, running, sse, tiny_model, tiny_runner, wait_until

HELLO = [{"role": "user", "content": "Hi"}]
PROMPT = [256, 257, *b"Hi", 258, 259]
VOCAB = ByteVocabulary()


def serving(backend: Any) -> AbstractContextManager[str]:
    return running(make_app(backend, VOCAB, CARD))


def ask(url: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"model": CARD.id, "messages": HELLO, **more}, timeout=30)


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def engine_url() -> Iterator[str]:
    worker = Worker(Engine(tiny_runner(512), max_batch=4))
    try:
        with serving(worker) as url:
            yield url
    finally:
        worker.close()


def expected_reply(seed: int, max_tokens: int, temperature: float = 0.8) -> tuple[str, str, int]:
    """Text, finish reason and tokens by slow generation; the engine has the same weights."""
    params = SampleParams(max_tokens, temperature=temperature, seed=seed, stop=tuple(VOCAB.special.values()))
    tokens = generate(tiny_model(), PROMPT, params)
    ended = tokens[-1] in params.stop
    text = bytes(tokens[:-1] if ended else tokens).decode(errors="replace")
    return text, "stop" if ended else "length", len(tokens)


def test_answers_are_those_of_slow_generation_streamed_or_not(engine_url: str) -> None:
    for seed in (1, 2):
        text, finish, tokens = expected_reply(seed, 20)
        answer = ask(engine_url, seed=seed, max_tokens=20).json()
        assert answer["choices"][0]["message"]["content"] == text
        assert answer["choices"][0]["finish_reason"] == finish
        assert answer["usage"] == {
            "prompt_tokens": len(PROMPT), "completion_tokens": tokens, "total_tokens": len(PROMPT) + tokens
        }  # fmt: skip
        events = sse(ask(engine_url, seed=seed, max_tokens=20, stream=True).text)
        assert events.pop() == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == text
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [finish]


def test_the_official_client_works_streaming_and_not(engine_url: str) -> None:
    api = client(engine_url)
    text, finish, tokens = expected_reply(3, 15)
    whole = api.chat.completions.create(model=CARD.id, messages=HELLO, seed=3, max_tokens=15)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, finish)
    assert whole.system_fingerprint == CARD.lineage["key"]
    stream = api.chat.completions.create(
        model=CARD.id, messages=HELLO, seed=3, max_completion_tokens=15, stream=True,
        stream_options={"include_usage": True}, extra_body={"top_k": 265},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [model.id for model in api.models.list()] == [CARD.id]
    assert api.models.retrieve(CARD.id).model_dump()["lineage"] == CARD.lineage


def test_the_official_client_understands_the_errors(engine_url: str) -> None:
    api = client(engine_url)
    with pytest.raises(openai.NotFoundError) as missing:
        api.chat.completions.create(model="gpt-5", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-5")
    with pytest.raises(openai.BadRequestError) as unsupported:
        api.chat.completions.create(model=CARD.id, messages=HELLO, n=17)
    assert unsupported.value.param == "n"
    with pytest.raises(openai.BadRequestError) as long:
        api.chat.completions.create(model=CARD.id, messages=[{"role": "user", "content": "x" * 125}])
    assert long.value.code == "context_length_exceeded"


def test_the_longest_prompt_that_fits_is_answered(engine_url: str) -> None:
    room = CARD.context - 4 - 1  # four special tokens around the text, one token of reply
    for size, status in ((room, 200), (room + 1, 400)):
        answer = ask(engine_url, messages=[{"role": "user", "content": "x" * size}])
        assert answer.status_code == status
    assert "128 tokens and the messages have 128" in answer.json()["error"]["message"]


def test_a_huge_prompt_is_refused_without_encoding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VOCAB, "encode", lambda text: pytest.fail("it was encoded"), raising=False)
    with serving(Scripted("x")) as url:
        answer = ask(url, messages=[{"role": "user", "content": "x" * 1_000_000}])
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_half_characters_and_stop_strings_never_show(piece: int) -> None:
    backend = Scripted("Grüße €5 😀 STOP and more", piece=piece)
    with serving(backend) as url:
        whole = ask(url, stop=["XX", "STOP"]).json()
        stream = sse(ask(url, stop=["XX", "STOP"], stream=True).text)
    assert whole["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Grüße €5 😀 ", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    said = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in stream[:-1]]
    assert "".join(said) == "Grüße €5 😀 "
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in said)
    assert piece == 100 or all(backend.closed), "what comes after a stop string must be cancelled"


def test_the_prompt_and_the_settings_reach_the_backend() -> None:
    backend = Scripted("ok")
    with serving(backend) as url:
        ask(url, temperature=0.3, top_k=5, top_p=0.9, seed=8, max_tokens=7)
    stop = tuple(sorted(VOCAB.special.values()))
    assert backend.asked == [(PROMPT, SampleParams(7, temperature=0.3, top_k=5, top_p=0.9, seed=8, stop=stop))]


def test_length_is_told() -> None:
    with serving(Scripted("ab", end=None)) as url:
        assert ask(url).json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_lost_before_the_first_token_is_503(stream: bool) -> None:
    with serving(Scripted("", end=ReplicaLostError("killed"), piece=1)) as url:
        answer = ask(url, stream=stream)
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "server_error"


def test_a_replica_lost_in_midstream_ends_with_an_error_event() -> None:
    with serving(Scripted("Hel", end=ReplicaLostError("killed"))) as url:
        events = sse(ask(url, stream=True).text)
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "replica_lost"
        assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "Hel"
        with pytest.raises(openai.APIError, match="replica that was answering is gone"):
            list(client(url).chat.completions.create(model=CARD.id, messages=HELLO, stream=True))
        assert ask(url).status_code == 503  # not streamed: half an answer is none


def test_our_own_mistakes_are_500_and_tell_no_details(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Scripted("Hel", end=KeyError("secret"))) as url:
        event = json.loads(sse(ask(url, stream=True).text)[-1])
        answer = ask(url)
    assert event["error"]["code"] == "internal_error"
    assert answer.status_code == 500
    assert "secret" not in answer.text + str(event)
    assert "secret" in caplog.text


def test_a_client_that_leaves_cancels_its_request() -> None:
    backend = Scripted("x" * 1_000, pause_s=0.01)
    with serving(backend) as url:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json={"model": CARD.id, "messages": HELLO, "stream": True}
        ) as r:
            next(r.iter_lines())
        wait_until(backend.closed)
    assert backend.closed == [True]


def test_the_first_token_comes_before_the_second_is_made() -> None:
    backend = Scripted("ab", pause_s=0.3)
    body = {"model": CARD.id, "messages": HELLO, "stream": True}
    with serving(backend) as url, httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        while '"content":"a"' not in next(lines):
            pass
        assert not backend.closed


def test_bodies_that_are_broken_or_too_large(engine_url: str) -> None:
    url = f"{engine_url}/v1/chat/completions"
    for data in (b"{", b'{"a": "\xff"}', b"[" * 200_000, b""):
        answer = httpx.post(url, content=data)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.post(url, content=b" " * (MOST_BODY_BYTES + 1)).status_code == 413
    chunked = httpx.post(url, content=iter([b" " * 65_536] * 17))  # its length is not told beforehand
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "request_too_large")


def test_unknown_paths_and_methods_have_the_same_shape(engine_url: str) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/docs", 404),
    ):
        answer = httpx.request(method, engine_url + path)
        assert answer.status_code == status
        assert path in answer.json()["error"]["message"]


def test_health_is_a_real_forward_pass(engine_url: str) -> None:
    assert httpx.get(f"{engine_url}/health").json() == {"status": "ok", "model": CARD.id}
    backend = Scripted("a")
    with serving(backend) as url:
        assert httpx.get(f"{url}/health").status_code == 200
    [((bos, _), params)] = backend.asked
    assert (bos, params) == (256, SampleParams(1, temperature=0))
    with serving(Scripted("", end=ReplicaLostError("all gone"))) as url:
        answer = httpx.get(f"{url}/health")
    assert (answer.status_code, answer.json()["why"]) == (503, "all gone")


def test_health_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.service.replies.HEALTH_TIMEOUT_S", 0.1)
    backend = Scripted("a", pause_s=5)
    with serving(backend) as url:
        answer = httpx.get(f"{url}/health")
    assert (answer.status_code, answer.json()["why"]) == (503, "no replica answered within 0.1 s")
    assert backend.closed == [True]


def test_the_page_may_load_nothing_but_itself(engine_url: str) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/page/style.css", "text/css"),
        ("/page/app.js", "text/javascript"),
        ("/page/icon.svg", "image/svg+xml"),
    ):
        answer = httpx.get(engine_url + path)
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", ""), "an outside address in the page"
        assert "innerHTML" not in answer.text
    assert httpx.get(f"{engine_url}/page/../deploy.py").status_code == 404


def test_a_dead_engine_is_told_to_everybody(caplog: pytest.LogCaptureFixture) -> None:
    class Poisoned(Engine):
        def step(self) -> list[Output]:
            if self.stats().num_requests_waiting:
                raise FloatingPointError("logits are not finite")
            return super().step()

    worker = Worker(Poisoned(tiny_runner()))
    with serving(worker) as url:
        assert ask(url).status_code == 503  # the request that broke it
        assert ask(url).status_code == 503  # and those after it
        assert "not finite" in httpx.get(f"{url}/health").json()["why"]
    with pytest.raises(ReplicaLostError, match="not finite"):
        worker.check()
    assert "the engine has failed" in caplog.text
    worker.close()
