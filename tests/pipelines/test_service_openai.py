"""The official `openai` client, unmodified, over all endpoints and errors. The engine is real, its weights random.

What the replies should be is known from slow generation with the same weights, and their log-probabilities from the
model's own log-softmax.
"""

import asyncio
import codecs
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from nanochat.attention import Rows
from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from pipelines.service.protocol import ReplicaLostError
from pipelines.service.web import make_app
from pipelines.service.worker import Worker
from tests.reference.generate import generate
from tests.serving import CARD, ByteVocabulary, Scripted, running, tiny_model, tiny_runner

HELLO: Any = [{"role": "user", "content": "Hi"}]
CHAT = [256, 257, *b"Hi", 258, 259]
VOCAB = ByteVocabulary()
STOP = tuple(VOCAB.special.values())
MODEL = tiny_model()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    worker = Worker(Engine(tiny_runner(1024), max_batch=8))
    try:
        with running(make_app(worker, VOCAB, CARD)) as address:
            yield address
    finally:
        worker.close()


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def expected(prompt: list[int], index: int = 0, **settings: Any) -> list[int]:
    params = SampleParams(**{"max_tokens": 12, "temperature": 0.8, "n": index + 1, "stop": STOP, **settings})
    return generate(MODEL, prompt, params, index)


def text(tokens: list[int]) -> str:
    return bytes(tokens[:-1] if tokens[-1] in STOP else tokens).decode(errors="replace")


def ended(tokens: list[int]) -> str:
    return "stop" if tokens[-1] in STOP else "length"


def logprobs(prompt: list[int], reply: list[int]) -> list[list[float]]:
    """The model's own log-softmax of what follows, for each token of the reply."""
    with torch.inference_mode():
        logits = MODEL.logits(MODEL(torch.tensor([[*prompt, *reply]]), Rows()))[0].double()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].tolist()


def told(token: int, prefix: str = "") -> str:
    """A token as OpenAI writes it."""
    if token >= 256:
        return {number: name for name, number in VOCAB.special.items()}[token]
    return chr(token) if token < 128 else f"{prefix}\\x{token:02x}"


def gathered(chunks: list[Any], replies: int) -> tuple[list[str], list[str]]:
    """Texts and finish reasons of the choices of a stream."""
    texts, reasons = [""] * replies, [""] * replies
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or "" if hasattr(choice, "delta") else choice.text
            reasons[choice.index] += choice.finish_reason or ""
    return texts, reasons


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == [CARD.id]
    card = api.models.retrieve(CARD.id)
    assert (card.object, card.created, card.owned_by) == ("model", CARD.created, "nanochat-ray")
    assert card.model_dump()["lineage"] == CARD.lineage


def test_a_chat_with_several_choices(api: openai.OpenAI) -> None:
    replies = [expected(CHAT, index, seed=5) for index in range(3)]
    assert len({tuple(reply) for reply in replies}) == 3
    whole = api.chat.completions.create(model=CARD.id, messages=HELLO, seed=5, max_tokens=12, n=3)
    assert whole.object == "chat.completion"
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.message.content for choice in whole.choices] == [text(reply) for reply in replies]
    assert [choice.finish_reason for choice in whole.choices] == [ended(reply) for reply in replies]
    assert whole.usage is not None
    counts = (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens)
    drawn = sum(map(len, replies))
    assert counts == (len(CHAT), drawn, len(CHAT) + drawn)


def test_a_chat_with_several_choices_streamed(api: openai.OpenAI) -> None:
    replies = [expected(CHAT, index, seed=5) for index in range(3)]
    *chunks, last = api.chat.completions.create(
        model=CARD.id, messages=HELLO, seed=5, max_completion_tokens=12, n=3, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert gathered(chunks, 3) == ([text(reply) for reply in replies], [ended(reply) for reply in replies])
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant"] * 3
    assert {chunk.id for chunk in chunks} == {last.id}
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == sum(map(len, replies))
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"seed": 1, "top_p": 0.5},
        {"seed": 2, "top_k": 3, "temperature": 2},
        {"seed": 3, "min_p": 0.2},
        {"seed": 4, "repetition_penalty": 1.5},
        {"seed": 2**64 - 1},
    ],
)
def test_the_settings_of_sampling_are_those_of_slow_generation(api: openai.OpenAI, settings: dict[str, Any]) -> None:
    ours = {name: settings[name] for name in settings.keys() & {"top_k", "min_p", "repetition_penalty"}}
    theirs: Any = {name: settings[name] for name in settings.keys() - ours.keys()}
    reply = expected(CHAT, **settings)
    whole = api.chat.completions.create(
        model=CARD.id, messages=HELLO, max_tokens=12, extra_body=ours, **theirs
    )  # fmt: skip
    assert whole.choices[0].message.content == text(reply)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_of_a_chat_are_the_models_own(api: openai.OpenAI, stream: bool, top: int) -> None:
    reply = expected(CHAT, seed=9)
    rows = logprobs(CHAT, reply)
    asked: Any = {"seed": 9, "max_tokens": 12, "logprobs": True, "top_logprobs": top}
    answer: Any = api.chat.completions.create(model=CARD.id, messages=HELLO, stream=stream, **asked)
    said: list[Any] = []
    for part in answer if stream else [answer]:
        found = part.choices[0].logprobs
        said += found.content if found else []
    shown = reply[:-1] if reply[-1] in STOP else reply
    assert [one.token for one in said] == [told(token) for token in shown]
    assert bytes(byte for one in said for byte in one.bytes) == bytes(shown)
    for one, token, row in zip(said, shown, rows, strict=False):
        assert math.isclose(one.logprob, row[token], abs_tol=1e-5)  # fp32 logits up to 15: 2**-20 each
        best = sorted(range(len(row)), key=lambda token, row=row: -row[token])[:top]
        assert [likely.token for likely in one.top_logprobs] == [told(token) for token in best]
        assert all(
            math.isclose(likely.logprob, row[token], abs_tol=1e-5)
            for likely, token in zip(one.top_logprobs, best, strict=True)
        )


def test_a_chat_without_logprobs_has_none(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model=CARD.id, messages=HELLO, max_tokens=2)
    assert whole.choices[0].logprobs is None


def offsets(tokens: list[int]) -> list[int]:
    """Characters before the one in which each token begins."""
    return [
        len(codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(tokens[:at]))) for at in range(len(tokens))
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_its_logprobs(api: openai.OpenAI, stream: bool) -> None:
    reply = next(reply for seed in range(99) if len(reply := expected([256, *b"Hi"], seed=seed)) == 12)
    seed = next(seed for seed in range(99) if expected([256, *b"Hi"], seed=seed) == reply)
    stop = text(reply)[6:8]
    left = text(reply)[: text(reply).index(stop)]
    shown = [token for token, offset in zip(reply, offsets(reply), strict=True) if offset < len(left)]
    answer: Any = api.completions.create(
        model=CARD.id, prompt="Hi", seed=seed, max_tokens=12, logprobs=1, stop=["never", stop], stream=stream
    )
    parts = list(answer) if stream else [answer]
    assert "".join(part.choices[0].text for part in parts) == left
    assert parts[-1].choices[0].finish_reason == "stop"
    assert [token for part in parts for token in part.choices[0].logprobs.tokens] == [
        told(token, "bytes:") for token in shown
    ]


def test_completions_of_every_form_of_prompt(api: openai.OpenAI) -> None:
    prompts = [[256, *b"Hi"], [256, *b"Yo"]]
    each = [[expected(prompt, index, seed=2) for index in range(2)] for prompt in prompts]
    for asked in (["Hi", "Yo"], prompts):
        whole = api.completions.create(model=CARD.id, prompt=asked, seed=2, max_tokens=12, n=2)
        assert whole.object == "text_completion"
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in whole.choices] == [text(reply) for both in each for reply in both]
        assert [choice.finish_reason for choice in whole.choices] == [ended(reply) for both in each for reply in both]
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == 6
        assert whole.usage.completion_tokens == sum(len(reply) for both in each for reply in both)
    for one in ("Hi", prompts[0]):
        assert api.completions.create(model=CARD.id, prompt=one, seed=2, max_tokens=12).choices[0].text == text(
            each[0][0]
        )


def test_completions_streamed(api: openai.OpenAI) -> None:
    prompts = [[256, *b"Hi"], [256, *b"Yo"]]
    replies = [expected(prompt, index, seed=2) for prompt in prompts for index in range(2)]
    *chunks, last = api.completions.create(
        model=CARD.id, prompt=["Hi", "Yo"], seed=2, max_tokens=12, n=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert gathered(chunks, 4) == ([text(reply) for reply in replies], [ended(reply) for reply in replies])
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, sum(map(len, replies)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [0, 2])
def test_logprobs_of_completions_are_the_models_own(api: openai.OpenAI, stream: bool, top: int) -> None:
    prompt = [256, *b"Hi"]
    reply = expected(prompt, seed=11)
    rows = logprobs(prompt, reply)
    answer: Any = api.completions.create(
        model=CARD.id, prompt="Hi", seed=11, max_tokens=12, logprobs=top, stream=stream
    )
    parts = [part.choices[0].logprobs for part in (answer if stream else [answer])]
    shown = reply[:-1] if reply[-1] in STOP else reply
    assert [token for part in parts for token in part.tokens] == [told(token, "bytes:") for token in shown]
    assert [offset for part in parts for offset in part.text_offset] == offsets(shown)
    values = [value for part in parts for value in part.token_logprobs]
    assert values == pytest.approx([row[token] for token, row in zip(shown, rows, strict=False)], abs=1e-5)
    if top == 0:
        assert all(part.top_logprobs is None for part in parts)
        return
    tops = [likely for part in parts for likely in part.top_logprobs]
    for likely, token, row in zip(tops, shown, rows, strict=False):
        best = sorted(range(len(row)), key=lambda token, row=row: -row[token])[:top]
        wanted = {told(one, "bytes:"): row[one] for one in [*best, token]}
        assert likely == pytest.approx(wanted, abs=1e-5)


ERRORS: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None, str | None]] = [
    ({"model": "gpt-5"}, openai.NotFoundError, "model", "model_not_found"),
    ({"n": 17}, openai.BadRequestError, "n", None),
    ({"temperature": 3}, openai.BadRequestError, "temperature", None),
    ({"stop": ["a"] * 5}, openai.BadRequestError, "stop", None),
    ({"max_tokens": 65}, openai.BadRequestError, "max_tokens", None),
    ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty", "unsupported_parameter"),
    ({"frequency_penalty": 1}, openai.BadRequestError, "frequency_penalty", "unsupported_parameter"),
    ({"logit_bias": {"1": 5}}, openai.BadRequestError, "logit_bias", "unsupported_parameter"),
    ({"extra_body": {"topk": 5}}, openai.BadRequestError, "topk", "unknown_parameter"),
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
CHAT_ERRORS = [
    ({"tools": [TOOL]}, openai.BadRequestError, "tools", "unsupported_parameter"),
    ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, openai.BadRequestError, "modalities", "unsupported_parameter"),
    ({"audio": {"voice": "a", "format": "wav"}}, openai.BadRequestError, "audio", "unsupported_parameter"),
    ({"messages": IMAGE}, openai.BadRequestError, "messages", None),
    ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "messages", None),
    ({"messages": [*HELLO, *HELLO]}, openai.BadRequestError, "messages", None),
    (
        {"messages": [{"role": "user", "content": "x" * 125}]},
        openai.BadRequestError,
        "messages",
        "context_length_exceeded",
    ),
    ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", None),
]
COMPLETION_ERRORS = [
    ({"echo": True}, openai.BadRequestError, "echo", "unsupported_parameter"),
    ({"suffix": "x"}, openai.BadRequestError, "suffix", "unsupported_parameter"),
    ({"best_of": 2}, openai.BadRequestError, "best_of", "unsupported_parameter"),
    ({"logprobs": 6}, openai.BadRequestError, "logprobs", None),
    ({"prompt": [265]}, openai.BadRequestError, "prompt", None),
    ({"prompt": "x" * 128}, openai.BadRequestError, "prompt", "context_length_exceeded"),
    ({"prompt": [1] * 128}, openai.BadRequestError, "prompt", "context_length_exceeded"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("said", "error", "param", "code"), ERRORS + CHAT_ERRORS)
def test_errors_of_chats(
    api: openai.OpenAI, stream: bool, said: dict[str, Any], error: type[openai.APIStatusError], param: str, code: str
) -> None:
    settings: Any = {"model": CARD.id, "messages": HELLO, "stream": stream, **said}
    with pytest.raises(error) as caught:
        api.chat.completions.create(**settings)
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("said", "error", "param", "code"), ERRORS + COMPLETION_ERRORS)
def test_errors_of_completions(
    api: openai.OpenAI, stream: bool, said: dict[str, Any], error: type[openai.APIStatusError], param: str, code: str
) -> None:
    settings: Any = {"model": CARD.id, "prompt": "Hi", "stream": stream, **said}
    with pytest.raises(error) as caught:
        api.completions.create(**settings)
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")


def test_what_is_not_there(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as model:
        api.models.retrieve("org/gpt-5")
    assert model.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings"):
        api.embeddings.create(model=CARD.id, input="x")
    with pytest.raises(openai.NotFoundError, match="POST /v1/responses"):
        api.responses.create(model=CARD.id, input="x")
    with pytest.raises(openai.APIStatusError) as method:
        api.models.delete(CARD.id)
    assert method.value.status_code == 405


def test_a_body_that_is_too_large(api: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        api.completions.create(model=CARD.id, prompt="x" * 2_000_000)
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_replica_that_is_lost(kind: str) -> None:
    for said, stream, error in (
        ("", False, openai.InternalServerError),
        ("", True, openai.InternalServerError),
        ("Hel", True, openai.APIError),
    ):
        backend = Scripted(said, end=ReplicaLostError("killed"))
        asked: Any = {"model": CARD.id, "stream": stream}
        with (
            running(make_app(backend, VOCAB, CARD)) as address,
            openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30) as client,
            pytest.raises(error, match="replica that was answering is gone"),
        ):
            list(
                client.chat.completions.create(messages=HELLO, **asked)
                if kind == "chat"
                else client.completions.create(prompt="Hi", **asked)
            )


def test_the_asynchronous_client_streams_many_at_once(url: str) -> None:
    seeds = range(8)

    async def one(client: openai.AsyncOpenAI, seed: int) -> tuple[str, str]:
        asked: Any = {"model": CARD.id, "seed": seed, "max_tokens": 12}
        whole = await client.completions.create(prompt="Hi", **asked)
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(messages=HELLO, stream=True, **asked)
        ]
        return "".join(pieces), whole.choices[0].text

    async def everybody() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model=CARD.id, messages=HELLO, tools=[TOOL])  # type: ignore[list-item]
            assert [model.id async for model in client.models.list()] == [CARD.id]
            return await asyncio.gather(*(one(client, seed) for seed in seeds))

    assert asyncio.run(everybody()) == [
        (text(expected(CHAT, seed=seed)), text(expected([256, *b"Hi"], seed=seed))) for seed in seeds
    ]
