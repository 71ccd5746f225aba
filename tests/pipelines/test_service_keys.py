"""Keys and their limits: the file, the refusals as the official client sees them, and that no key is ever told."""

import io
import json
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate

from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from pipelines import cli
from pipelines.service.chat import chat
from pipelines.service.client import Client, ServiceError
from pipelines.service.keys import Key, KeyFileError, Keys, Limits, entry_of, make_key, open_to_others, read_keys
from pipelines.service.openapi import document
from pipelines.service.protocol import ApiError, OverloadedError
from pipelines.service.rates import Bucket, Rates
from pipelines.service.web import make_app
from tests.serving import CARD, ByteVocabulary, Scripted, running

ALICE, BOB = make_key(), make_key()
HELLO: Any = [{"role": "user", "content": "Hi"}]
PROMPT = 6  # tokens of HELLO


def keys(**limits: int) -> Keys:
    """Alice's, with these limits, and Bob's without any."""
    return Keys({"alice": limits_of(ALICE, **limits), "bob": limits_of(BOB)})


def limits_of(key: str, **limits: int) -> Limits:
    return Limits(**{**json.loads(entry_of("x", key).partition(": ")[2]), **limits})


def app(backend: Any, **limits: int) -> Any:
    return make_app(backend, ByteVocabulary(), CARD, keys(**limits))


def client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def ask(url: str, key: str, **more: Any) -> Any:
    """The whole answer, with its headers."""
    with client(url, key) as api:
        answer = api.chat.completions.with_raw_response.create(model=CARD.id, messages=HELLO, **more)
        if more.get("stream"):
            assert len(list(answer.parse())) > 3
        return answer


# ---- the file


def test_an_entry_that_was_made_is_found_by_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", "alice@example.org"]) == 0
    said = capsys.readouterr().out
    key = next(line for line in said.splitlines() if line.startswith("nc-"))
    entry = said.splitlines()[-1]
    assert key not in entry
    path = tmp_path / "keys.yaml"
    path.write_text(f"{entry}\n")
    found = read_keys(path)
    assert found.find(key) == Key("alice@example.org", None, None)
    for other in (key[:-1], key + "x", key.upper(), "", "nc-", "\udcff", "x" * 10_000):
        assert found.find(other) is None
    assert cli.main(["key", "no name"]) == 2
    assert "'no name' is no name" in capsys.readouterr().err


def test_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"a": limits_of(ALICE, requests_per_minute=3).model_dump()}, indent=1))
    assert read_keys(path).find(ALICE) == Key("a", 3, None)


def test_every_problem_of_a_file_is_named_and_no_value(tmp_path: Path) -> None:
    good = entry_of("x", BOB).partition(": ")[2]
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"a: {{sha256: {ALICE}}}\nb: {{requests_per_minute: 3}}\nc: {good[:-1]}, tokens_per_minute: 0}}\n".replace(
            '"tokens_per_minute": null, ', "", 1
        ).replace(', "tokens_per_minute": null', "")
        + f"d: {{sha: {ALICE}}}\n"
        + f"no name: {good}\n"
    )
    with pytest.raises(KeyFileError) as error:
        read_keys(path)
    said = str(error.value)
    assert ALICE not in said
    assert "64 of 0-9 and a-f; `nanochat key NAME` makes" in said.splitlines()[0]
    for line, words in ((1, "a.sha256"), (2, "b.sha256"), (3, "c.tokens_per_minute"), (4, "d.sha:"), (5, "no name")):
        assert any(one.startswith(f"{path}:{line}: {words}") for one in said.splitlines()), (words, said)


@pytest.mark.parametrize("text", ["", "- a", "a", "{}", f"a: {ALICE}", "a: {", "a: 1\na: 2"])
def test_what_is_no_key_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeyFileError) as error:
        read_keys(path)
    assert ALICE not in str(error.value)


def test_one_key_has_one_name(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"{entry_of('a', ALICE)}\n{entry_of('b', ALICE)}\n")
    with pytest.raises(KeyFileError, match="2: b has the key of a; give each its own"):
        read_keys(path)
    with pytest.raises(KeyFileError, match="no such file; `nanochat key NAME` makes"):
        read_keys(tmp_path / "none")
    path.write_bytes(b"\xff")
    with pytest.raises(KeyFileError, match="not UTF-8"):
        read_keys(path)


def test_a_file_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.touch(0o600)
    assert open_to_others(path) is None
    path.chmod(0o640)
    assert open_to_others(path) == f"{path} can be read by other users (mode 640): chmod 600 {path}"


# ---- who may ask


def test_every_path_but_those_listed_wants_a_key() -> None:
    made = app(Scripted("ok"))
    paths = {(method, route.path.replace(":path", "")) for route in made.routes for method in route.methods - {"HEAD"}}
    told = {(m.upper(), path) for path, item in document(CARD, 265, keyed=True)["paths"].items() for m in item}
    unguarded = {("GET", path) for path in ("/", "/page/{name}", "/health", "/openapi.json")}
    assert paths == told | unguarded
    with running(made) as url, httpx.Client(base_url=url) as http:
        for method, path in paths:
            address = path.format(name="app.js" if "page" in path else CARD.id)
            for header in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {ALICE}"}):
                status = http.request(method, address, headers=header).status_code
                assert status == (200 if (method, path) in unguarded else 401), (method, path, header)


def test_the_official_client_is_told_that_its_key_is_wrong() -> None:
    with running(app(Scripted("ok"))) as url:
        with pytest.raises(openai.AuthenticationError, match="the key is not known here") as wrong:
            ask(url, "nc-wrong")
        assert wrong.value.code == "invalid_api_key"
        assert wrong.value.type == "invalid_request_error"  # as OpenAI has it
        assert wrong.value.response.headers["www-authenticate"] == "Bearer"
        with client(url, "nc-wrong") as api, pytest.raises(openai.AuthenticationError):
            api.models.list()
        with client(url, BOB) as api:
            assert api.models.list().data[0].id == CARD.id
        answer = ask(url, BOB)
        assert answer.parse().choices[0].message.content == "ok"
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
        assert httpx.get(f"{url}/v1/models", headers={"authorization": f"bearer {BOB}"}).status_code == 200


def test_no_key_is_ever_told(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    heard = []
    with running(app(Scripted("ok", end=RuntimeError("broken")), requests_per_minute=1)) as url:
        for key in (ALICE, ALICE, BOB, BOB[:-1]):
            for path in ("/v1/chat/completions", "/v1/completions", "/nowhere"):
                body = {"model": CARD.id, "messages": HELLO}
                answer = httpx.post(f"{url}{path}", json=body, headers={"Authorization": f"Bearer {key}"})
                heard.append(f"{answer.headers} {answer.text}")
        heard.append(httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {ALICE}"}).text)
        heard.append(httpx.get(f"{url}/openapi.json").text)
    heard += [caplog.text, *capsys.readouterr()]
    secrets = (ALICE, BOB[:-1], limits_of(ALICE).sha256, limits_of(BOB).sha256)
    assert not [text for text in heard for secret in secrets if secret in text]


def test_the_document_says_what_keys_are_for() -> None:
    open_, keyed = document(CARD, 265), document(CARD, 265, keyed=True)
    validate(keyed)
    assert "securitySchemes" not in open_["components"]
    assert "401" not in open_["paths"]["/v1/models"]["get"]["responses"]
    for path, item in keyed["paths"].items():
        for operation in item.values():
            assert (
                ("401" in operation["responses"]) == (operation.get("security") == [{"key": []}]) == (path != "/health")
            )


def test_our_own_client_sends_its_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    with running(app(Scripted("hello"))) as url:
        with Client(url) as without, pytest.raises(ServiceError, match="set NANOCHAT_API_KEY to yours"):
            without.model()
        assert chat(url, BOB) == 0
        monkeypatch.setenv("NANOCHAT_API_KEY", "nc-other")
        assert cli.main(["chat", url]) == 1
    out, err = capsys.readouterr()
    assert out.strip() == "hello"
    assert "wants a key that it knows" in err
    with pytest.raises(ServiceError, match="NANOCHAT_API_KEY"):
        Client(url, "a\nb")


# ---- how much


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 100), st.booleans()), max_size=40),
)
def test_no_span_of_time_allows_more_than_its_limit(per_minute: int, schedule: list[tuple[float, int, bool]]) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    allowed: list[tuple[float, int]] = []
    for pause, amount, patient in schedule:
        clock.now += pause
        wait = bucket.wait_s(amount)
        if wait and patient and amount <= per_minute:
            clock.now += 0.99 * wait
            assert bucket.wait_s(amount), "it could have been had earlier than was said"
            clock.now += 0.01 * wait
            assert not bucket.wait_s(amount), "whoever waits as was said gets it"
            wait = 0
        if not wait:
            bucket.take(amount)
            allowed.append((clock.now, amount))
    for first, (began, _) in enumerate(allowed):
        for last, (ended, _) in enumerate(allowed[first:], first):
            total = sum(amount for _, amount in allowed[first : last + 1])
            assert total <= per_minute * (1 + (ended - began) / 60) + 1e-3


def test_a_key_without_limits_has_none_and_one_with_has_its_own() -> None:
    clock = Clock()
    rates = Rates(clock)
    free, one, other = Key("free", None, None), Key("one", 2, None), Key("other", 2, None)
    for _ in range(10_000):
        rates.begin(free, 10**9)
    for key in (one, other):
        rates.begin(key, 10**9)
        rates.begin(key, 10**9)
        with pytest.raises(ApiError, match=r"2 requests a minute; ask again in 30\.0 s") as error:
            rates.begin(key, 1)
        assert error.value.retry_after_s == pytest.approx(30)
    clock.now += 30
    rates.begin(one, 1)
    assert rates.headers(one) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.000s",
    }


def test_a_refusal_takes_nothing() -> None:
    rates, key = Rates(Clock()), Key("a", 5, 100)
    rates.begin(key, 90)
    for _ in range(20):
        with pytest.raises(ApiError, match=r"100 tokens a minute; ask again in 3\.0 s"):
            rates.begin(key, 15)
    assert rates.headers(key)["x-ratelimit-remaining-requests"] == "4"
    rates.begin(key, 10)


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_client_is_told_to_wait(stream: bool) -> None:
    with running(app(Scripted("ok"), requests_per_minute=2)) as url:
        answers = [ask(url, ALICE, stream=stream) for _ in range(2)]
        assert [one.headers["x-ratelimit-remaining-requests"] for one in answers] == ["1", "0"]
        with pytest.raises(openai.RateLimitError, match="'alice' has 2 requests a minute") as error:
            ask(url, ALICE, stream=stream)
        assert error.value.code == "rate_limit_exceeded"
        assert error.value.response.headers["retry-after"] == "30"
        ask(url, BOB, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_not_drawn_is_given_back(stream: bool) -> None:
    with running(app(Scripted("ok"), tokens_per_minute=100)) as url:
        cost = PROMPT + 3  # o, k and the end
        for number in range(4):  # the last finds 73, of which it could need 70
            answer = ask(url, ALICE, max_tokens=64, stream=stream)
            if not stream:
                left = 100 - cost * (number + 1)
                assert left <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= left + 5  # fills meanwhile
        with pytest.raises(openai.RateLimitError, match="100 tokens a minute"):
            ask(url, ALICE, max_tokens=64)
        with pytest.raises(
            openai.BadRequestError, match="134 tokens together; the key 'alice' has 100 a minute"
        ) as error:
            ask(url, ALICE, max_tokens=64, n=2)
        assert error.value.code == "tokens_over_limit"
        assert error.value.param == "max_tokens"


def test_a_client_that_leaves_gets_back_what_was_not_drawn() -> None:
    with running(app(Scripted("x" * 64, pause_s=0.05), tokens_per_minute=100)) as url:
        with client(url, ALICE) as api:
            stream = api.chat.completions.create(model=CARD.id, messages=HELLO, max_tokens=64, stream=True)
            next(iter(stream))
            stream.close()
        for _ in range(100):  # until the service has seen it
            answer = httpx.post(
                f"{url}/v1/chat/completions",
                json={"model": CARD.id, "messages": HELLO, "max_tokens": 64},
                headers={"Authorization": f"Bearer {ALICE}"},
            )
            if answer.status_code == 200:
                return
        raise AssertionError(answer.text)


class Full:
    """A Backend without room."""

    async def generate(self, tokens: list[int], params: SampleParams) -> AsyncGenerator[Output, None]:
        raise OverloadedError("9 requests with 70 tokens wait already", 6.2)
        yield

    async def stats(self) -> list[Any]:
        return []


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_service_says_when_and_takes_nothing_from_the_key(stream: bool) -> None:
    with running(app(Full(), requests_per_minute=2, tokens_per_minute=80)) as url:
        for _ in range(3):
            with pytest.raises(
                openai.RateLimitError, match="9 requests with 70 tokens wait already; ask again in 7 s"
            ) as error:
                ask(url, ALICE, stream=stream)
            assert error.value.code == "overloaded"
            assert error.value.response.headers["retry-after"] == "7"
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "model": CARD.id}, "it is at work"
        for key in (BOB, "x", "y"):
            with pytest.raises(openai.APIStatusError):
                ask(url, key)
        metrics = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {BOB}"}).text
        name = "nanochat:requests_turned_away_total"
        counted = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith(name))
        assert counted == {
            f'{name}{{reason="invalid_api_key"}}': "2.0",
            f'{name}{{reason="overloaded"}}': "4.0",
            f'{name}{{reason="rate_limit_exceeded"}}': "0.0",
        }
