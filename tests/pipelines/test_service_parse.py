"""What a request may say: each refusal is OpenAI's 400 with the parameter at fault, and nothing is ignored."""

import json
from typing import Any

import pytest

from pipelines.service.parse import parse_chat, parse_completion
from pipelines.service.protocol import ApiError
from pipelines.service.requests import MOST_DEPTH, NEUTRAL_CHAT, NEUTRAL_COMPLETION
from tests.serving import CARD

HELLO = [{"role": "user", "content": "Hello"}]


def body(**more: Any) -> bytes:
    return json.dumps({"model": "tiny-chat", "messages": HELLO, **more}).encode()


def refusal(data: bytes) -> tuple[int, Any, Any, str]:
    with pytest.raises(ApiError) as caught:
        parse_chat(data, CARD)
    error = caught.value.body["error"]
    assert error["type"] == "invalid_request_error"
    return caught.value.status, error["param"], error["code"], error["message"]


def test_the_defaults_are_the_services() -> None:
    ask = parse_chat(body(), CARD)
    assert ask.messages == HELLO
    assert (ask.params.max_tokens, ask.params.temperature, ask.params.seed) == (64, 0.8, None)
    assert (ask.stop, ask.stream, ask.include_usage) == ((), False, False)


def test_every_setting_arrives() -> None:
    ask = parse_chat(
        body(temperature=0, top_p=0.5, top_k=7, seed=-1, max_tokens=3, stop=["a", "b"], stream=True,
             stream_options={"include_usage": True}),
        CARD,
    )  # fmt: skip
    params = ask.params
    more = parse_chat(body(min_p=0.1, repetition_penalty=1.2, n=3, logprobs=True, top_logprobs=2), CARD).params
    assert (more.min_p, more.repetition_penalty, more.n, more.logprobs) == (0.1, 1.2, 3, 2)
    assert parse_chat(body(logprobs=True), CARD).params.logprobs == 0
    assert parse_chat(body(logprobs=False, top_logprobs=0), CARD).params.logprobs is None
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0, 0.5, 7, 2**64 - 1)
    assert (params.max_tokens, ask.stop, ask.stream, ask.include_usage) == (3, ("a", "b"), True, True)
    assert parse_chat(body(max_completion_tokens=5.0), CARD).params.max_tokens == 5
    assert parse_chat(body(stop="x"), CARD).stop == ("x",)


def test_null_means_not_given() -> None:
    names = ["temperature", "top_p", "top_k", "seed", "max_tokens", "stop", "stream", "stream_options", *NEUTRAL_CHAT]
    assert parse_chat(body(**dict.fromkeys(names)), CARD) == parse_chat(body(), CARD)


def test_what_asks_for_nothing_is_accepted() -> None:
    plain = parse_chat(body(), CARD)
    for name, values in NEUTRAL_CHAT.items():
        for value in values:
            assert parse_chat(body(**{name: value}), CARD) == plain
    assert parse_chat(body(user="me", frequency_penalty=0.0), CARD) == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("store", True),
        ("reasoning_effort", "high"),
    ],
)
def test_what_is_not_supported_is_refused(name: str, value: Any) -> None:
    assert refusal(body(**{name: value}))[:3] == (400, name, "unsupported_parameter")


def test_an_unknown_parameter_is_refused() -> None:
    assert refusal(body(temprature=1))[:3] == (400, "temprature", "unknown_parameter")


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": 2**31}, "top_k"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"max_completion_tokens": 10**100}, "max_completion_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": {}}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"what": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], param: str) -> None:
    status, named, _, message = refusal(body(**settings))
    assert (status, named) == (400, param)
    assert param in message


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        ["hello"],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "tool", "content": "x"}],
        [{"role": "system", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [*HELLO, {"role": "assistant", "content": "x"}],
        [*HELLO, *HELLO],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [*HELLO, {"role": "assistant", "content": "x", "tool_calls": [{}]}, *HELLO],
    ],
)
def test_what_is_no_chat_is_refused(messages: Any) -> None:
    assert refusal(body(messages=messages))[:2] == (400, "messages")


def test_text_parts_and_developer_messages_are_understood() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chat = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts, "name": "Ann"}]
    assert parse_chat(body(messages=chat), CARD).messages == [{"role": "system", "content": "Be kind."}, *HELLO]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "JSON object, not list"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"seed": NaN}', "NaN is no number"),
        (b'{"seed": -Infinity}', "Infinity is no number"),
        (b'{"seed": ' + b"9" * 5_000 + b"}", "not JSON"),
        (b'{"model": "\\ud800"}', "surrogate"),
    ],
)
def test_a_broken_body_is_400(data: bytes, said: str) -> None:
    status, _, _, message = refusal(data)
    assert status == 400
    assert said in message


def test_another_model_is_404() -> None:
    assert refusal(body(model="gpt-5"))[:3] == (404, "model", "model_not_found")
    assert refusal(body(model=None))[:2] == (400, "model")


def test_nesting_is_limited_where_it_is_said_to_be() -> None:
    def nested(depth: int) -> Any:  # the body itself and `metadata` make two
        return {} if depth == 2 else {"a": nested(depth - 1)}

    assert parse_chat(body(metadata=nested(MOST_DEPTH)), CARD) == parse_chat(body(), CARD)
    assert "more than 32" in refusal(body(metadata=nested(MOST_DEPTH + 1)))[3]


def test_all_faults_are_told_at_once() -> None:
    status, param, _, message = refusal(body(messages=[{"role": "user", "content": 5}], temperature=3, n=0))
    assert (status, param) == (400, "temperature")
    assert message == (
        "temperature is 3; it should be less than or equal to 2; n is 0; it should be greater than or equal to 1; "
        "messages[0].content must be a text, or a list of parts like {'type': 'text', 'text': '...'}; "
        "only text is supported"
    )


def completion(**more: Any) -> bytes:
    return json.dumps({"model": "tiny-chat", **more}).encode()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("Hi", ["Hi"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_forms_of_a_prompt(prompt: Any, prompts: Any) -> None:
    ask = parse_completion(completion(prompt=prompt), CARD)
    assert (ask.prompts, ask.params.max_tokens, ask.params.logprobs) == (prompts, 16, None)


def test_the_settings_of_a_completion() -> None:
    more = {"max_tokens": 64, "n": 2, "best_of": 2, "logprobs": 5, "stop": "x", "echo": False, "seed": 3}
    ask = parse_completion(completion(prompt="a", **more), CARD)
    assert (ask.params.max_tokens, ask.params.n, ask.params.logprobs, ask.stop) == (64, 2, 5, ("x",))
    nothing = completion(prompt="a", **dict.fromkeys(NEUTRAL_COMPLETION))
    assert parse_completion(nothing, CARD) == parse_completion(completion(prompt="a"), CARD)


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": ["a"] * 32, "n": 3}, "n"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "max_tokens": 65}, "max_tokens"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": "a", "tools": []}, "tools"),
    ],
)
def test_a_wrong_completion_is_named(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion(completion(**settings), CARD)
    assert (caught.value.status, caught.value.body["error"]["param"]) == (400, param)
    assert param in caught.value.body["error"]["message"]
