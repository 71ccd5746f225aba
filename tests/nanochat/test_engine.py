"""The engine against generation one token at a time, without a cache, one request at a time."""

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanochat.attention import Rows
from nanochat.config import ModelConfig
from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.model import GPT
from tests.reference.generate import generate

VOCAB = 97
CONTEXT = 128


@pytest.fixture(scope="module")
def model() -> GPT:
    config = ModelConfig(depth=2, context=CONTEXT, head_dim=8, aspect=16, kv_heads=2)
    gpt = GPT(config, VOCAB)
    generator = torch.Generator().manual_seed(5)
    for weight in gpt.parameters():  # no weight is zero, so every part of the model counts
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return gpt


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def run(engine: Engine, ids: Iterable[int]) -> dict[int, tuple[list[int], str | None]]:
    """Steps until every one of `ids` has ended: id -> (tokens, why it ended)."""
    open_ids, tokens, ends = set(ids), defaultdict(list), {}
    while open_ids:
        outputs = engine.step()
        assert outputs, "the engine stands still with requests open"
        for output in outputs:
            assert len(output.tokens) == len(output.logprobs)
            assert output.id not in ends, "a request went on after its end"
            tokens[output.id] += output.tokens
            if output.finish:
                ends[output.id] = output.finish
                open_ids.discard(output.id)
    return {id: (tokens[id], end) for id, end in ends.items()}


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 0}, {}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.5}],
)
def test_every_reply_is_that_of_slow_generation(model: GPT, setting: dict[str, Any]) -> None:
    engine = Engine(model, max_batch=5, kv_tokens=200)  # 200: not all five fit at all times
    asked = [
        (prompt, SampleParams(max_tokens=6 + 3 * (n % 4), seed=n, stop=(3, 50 + n), **setting))
        for n, prompt in enumerate(prompts(12))
    ]
    ids = [engine.add(prompt, params) for prompt, params in asked]
    replies = run(engine, ids)
    for id, (prompt, params) in zip(ids, asked, strict=True):
        expected = generate(model, prompt, params)
        assert replies[id] == (expected, "stop" if expected[-1] in params.stop else "length")


def test_a_reply_goes_on_where_it_broke_off(model: GPT) -> None:
    [prompt] = prompts(1)
    params = SampleParams(max_tokens=12, seed=9)
    engine = Engine(model)
    id = engine.add(prompt, params)
    whole = run(engine, [id])[id][0]
    for cut in (1, 5, 11):
        rest = engine.add(prompt + whole[:cut], replace(params, max_tokens=12 - cut))
        assert run(engine, [rest])[rest][0] == whole[cut:]


def test_the_context_ends_a_reply_with_length(model: GPT) -> None:
    engine = Engine(model)
    id = engine.add([1] * (CONTEXT - 5), SampleParams(max_tokens=100, temperature=0))
    tokens, finish = run(engine, [id])[id]
    assert (len(tokens), finish) == (5, "length")


def test_the_engines_stop_tokens_serve_requests_that_name_none(model: GPT) -> None:
    [prompt] = prompts(1)
    free = generate(model, prompt, SampleParams(max_tokens=20, seed=1))
    engine = Engine(model, stop=(free[4],))
    first = engine.add(prompt, SampleParams(max_tokens=20, seed=1))
    other = engine.add(prompt, SampleParams(max_tokens=20, seed=1, stop=(free[8],)))
    replies = run(engine, [first, other])
    assert replies[first] == (free[: free.index(free[4]) + 1], "stop")
    assert replies[other] == (free[: free.index(free[8]) + 1], "stop")


def test_without_a_seed_two_replies_differ(model: GPT) -> None:
    engine = Engine(model)
    ids = [engine.add([1, 2, 3], SampleParams(max_tokens=20)) for _ in range(2)]
    replies = run(engine, ids)
    assert replies[ids[0]] != replies[ids[1]]  # 20 draws among 97 tokens


def test_logprobs_are_the_models(model: GPT) -> None:
    [prompt] = prompts(1)
    engine = Engine(model)
    engine.add(prompt, SampleParams(max_tokens=5, seed=2, temperature=0.5, top_k=9))
    tokens: list[int] = []
    logprobs: list[float] = []
    while outputs := engine.step():
        tokens += outputs[0].tokens
        logprobs += outputs[0].logprobs
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([prompt + tokens]), Rows()))[0, len(prompt) - 1 : -1]
    expected = logits.double().log_softmax(-1)[range(5), tokens]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-5)  # fp32 logits of two orders of summation


def test_requests_start_in_order_and_within_the_limits(model: GPT) -> None:
    engine = Engine(model, max_batch=3, kv_tokens=100)
    sizes = [60, 20, 90, 5, 5, 5, 5]  # 90 waits for 60 and 20 to end, and nothing passes it
    for size in sizes:
        engine.add([1] * (size - 3), SampleParams(max_tokens=3, temperature=0))
    started: list[int] = []
    while outputs := engine.step():
        started += [output.id for output in outputs if output.id not in started]
        stats = engine.stats()
        assert stats.running <= 3
        assert stats.kv_reserved <= 100
    assert started == list(range(len(sizes)))
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_reserved) == (0, 0, 0)
    assert stats.prompt_tokens == sum(size - 3 for size in sizes)
    assert stats.new_tokens == 3 * len(sizes)


def test_cancel_at_any_moment_frees_and_disturbs_nobody(model: GPT) -> None:
    params = SampleParams(max_tokens=8, seed=4)
    asked = prompts(5, seed=3, longest=20)
    expected = [generate(model, prompt, params) for prompt in asked]
    for victim in range(5):
        for moment in range(0, 18, 3):
            engine = Engine(model, max_batch=2, kv_tokens=60)
            ids = [engine.add(prompt, params) for prompt in asked]
            got: dict[int, list[int]] = defaultdict(list)
            for step in range(100):
                if step == moment:
                    engine.cancel(ids[victim])
                    engine.cancel(ids[victim])  # twice is no error
                    after = list(got[ids[victim]])
                outputs = engine.step()
                if not outputs and step > moment:
                    break
                for output in outputs:
                    got[output.id] += output.tokens
            assert got[ids[victim]] == after, "a cancelled request went on"
            assert all(got[ids[n]] == expected[n] for n in range(5) if n != victim)
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.kv_reserved) == (0, 0, 0)


def test_an_idle_engine_has_nothing_to_say(model: GPT) -> None:
    assert Engine(model).step() == []


def test_output_tells_what_one_step_added(model: GPT) -> None:
    engine = Engine(model)
    id = engine.add([1], SampleParams(max_tokens=1, temperature=0))
    [output] = engine.step()
    assert isinstance(output, Output)
    assert (output.id, len(output.tokens), output.finish) == (id, 1, "length")


@pytest.mark.parametrize(
    ("tokens", "params", "said"),
    [
        ([], SampleParams(1), "tokens is empty"),
        ([1, VOCAB], SampleParams(1), "tokens holds 97"),
        ([1, -1], SampleParams(1), "tokens holds -1"),
        ([1], SampleParams(1, stop=(VOCAB,)), "stop holds 97"),
        ([1] * CONTEXT, SampleParams(1), "tokens are 128"),
        ([1] * 10, SampleParams(60), "max_tokens is 60"),
    ],
)
def test_a_bad_request_is_refused_and_named(model: GPT, tokens: list[int], params: SampleParams, said: str) -> None:
    engine = Engine(model, kv_tokens=64)
    with pytest.raises(ValueError, match=f"^{said}"):
        engine.add(tokens, params)
    assert engine.step() == []


def test_an_engine_that_could_run_nothing_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="max_batch is 0"):
        Engine(model, max_batch=0)
    with pytest.raises(ValueError, match="kv_tokens is 1"):
        Engine(model, kv_tokens=1)
    with pytest.raises(ValueError, match="id is 0"):
        Engine(model).cancel(0)
