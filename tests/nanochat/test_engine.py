"""The engine against generation one token at a time, without a cache, one request at a time."""

import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.attention import Rows
from nanochat.engine.engine import Engine
from nanochat.engine.runner import BLOCK, Batch
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from tests.nanochat.runners import NullRunner, PlainRunner
from tests.nanochat.sizes import VOCAB, filled, small
from tests.reference.generate import generate

MODEL = filled(small(2))
CONTEXT = MODEL.config.context


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def engine_of(blocks: int = 32, **settings: Any) -> Engine:
    return Engine(PlainRunner(MODEL, blocks), **settings)


def run(engine: Engine, ids: Iterable[int]) -> dict[tuple[int, int], tuple[list[int], str | None]]:
    """Steps until every one of `ids` has ended: (id, index) -> (tokens, why it ended)."""
    ids, tokens, ends = set(ids), defaultdict(list), {}
    while load(engine):
        for output in engine.step():
            tokens[output.id, output.index] += output.tokens
            if output.finish:
                ends[output.id, output.index] = output.finish
    assert ids == {id for id, _ in ends}
    return {key: (tokens[key], end) for key, end in ends.items()}


def load(engine: Engine) -> int:
    stats = engine.stats()
    return stats.num_requests_running + stats.num_requests_waiting


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 0}, {}, {"temperature": 0.7, "top_k": 20}, {"repetition_penalty": 1.2}, {"min_p": 0.1}],
)
def test_every_reply_is_that_of_slow_generation(setting: dict[str, Any]) -> None:
    engine = engine_of(8, max_batch=5, step_tokens=24, speculate=2)
    asked = [
        (prompt, SampleParams(max_tokens=6 + 3 * (n % 4), seed=n, stop=(3, 40 + n), **setting))
        for n, prompt in enumerate(prompts(12))
    ]
    ids = [engine.add(prompt, params) for prompt, params in asked]
    replies = run(engine, ids)
    for id, (prompt, params) in zip(ids, asked, strict=True):
        expected = generate(MODEL, prompt, params)
        assert replies[id, 0] == (expected, "stop" if expected[-1] in params.stop else "length")


def test_a_reply_goes_on_where_it_broke_off() -> None:
    [prompt] = prompts(1)
    params = SampleParams(max_tokens=12, seed=9)
    engine = engine_of()
    id = engine.add(prompt, params)
    whole = run(engine, [id])[id, 0][0]
    for cut in (1, 5, 11):
        rest = engine.add(prompt + whole[:cut], replace(params, max_tokens=12 - cut))
        assert run(engine, [rest])[rest, 0][0] == whole[cut:]


def test_the_replies_of_one_request_have_seeds_of_their_own_and_one_prompt() -> None:
    prompt = prompts(1)[0] * 3
    params = SampleParams(max_tokens=9, seed=2**64 - 2, n=4)
    engine = engine_of(max_batch=8)
    id = engine.add(prompt, params)
    replies = run(engine, [id])
    assert replies == {(id, index): (generate(MODEL, prompt, params, index), "length") for index in range(4)}
    assert len({tuple(tokens) for tokens, _ in replies.values()}) == 4
    # Each but the first computes the last token of the prompt again, because its logits are needed.
    assert engine.stats().computed_tokens == len(prompt) + 3 + 4 * 8


def test_the_context_ends_a_reply_with_length() -> None:
    engine = engine_of()
    id = engine.add([1] * (CONTEXT - 5), SampleParams(max_tokens=100, temperature=0))
    tokens, finish = run(engine, [id])[id, 0]
    assert (len(tokens), finish) == (5, "length")


def test_the_cache_ends_a_reply_with_length() -> None:
    engine = engine_of(3)
    params = SampleParams(max_tokens=100, seed=1)
    ids = [engine.add(prompt, params) for prompt in ([1] * 20, [2] * 48)]  # 48: all of it
    replies = run(engine, ids)
    for id, prompt in zip(ids, ([1] * 20, [2] * 48), strict=True):
        assert replies[id, 0] == (generate(MODEL, prompt, params)[: 49 - len(prompt)], "length")


def test_the_engines_stop_tokens_serve_requests_that_name_none() -> None:
    [prompt] = prompts(1)
    free = generate(MODEL, prompt, SampleParams(max_tokens=20, seed=1))
    engine = engine_of(stop=(free[4],))
    first = engine.add(prompt, SampleParams(max_tokens=20, seed=1))
    other = engine.add(prompt, SampleParams(max_tokens=20, seed=1, stop=(free[8],)))
    replies = run(engine, [first, other])
    assert replies[first, 0] == (free[: free.index(free[4]) + 1], "stop")
    assert replies[other, 0] == (free[: free.index(free[8]) + 1], "stop")


def test_without_a_seed_two_replies_differ() -> None:
    engine = engine_of()
    ids = [engine.add([1, 2, 3], SampleParams(max_tokens=20)) for _ in range(2)]
    replies = run(engine, ids)
    assert replies[ids[0], 0] != replies[ids[1], 0]  # 20 draws among 61 tokens


def test_logprobs_are_the_models_and_only_for_those_who_ask() -> None:
    [prompt] = prompts(1)
    engine = engine_of()
    engine.add(prompt, SampleParams(max_tokens=5, seed=2, temperature=0.5, top_k=9, logprobs=3))
    silent = engine.add(prompt, SampleParams(max_tokens=5, seed=2))
    tokens: list[int] = []
    logprobs: list[float] = []
    top: list[dict[int, float]] = []
    while load(engine):
        for output in engine.step():
            if output.id == silent:
                assert output.logprobs == output.top == []
            else:
                tokens, logprobs, top = tokens + output.tokens, logprobs + output.logprobs, top + output.top
    with torch.inference_mode():
        logits = MODEL.logits(MODEL(torch.tensor([prompt + tokens]), Rows()))[0, len(prompt) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    assert logprobs == pytest.approx(expected[range(5), tokens].tolist(), abs=1e-5)  # fp32, two orders of summation
    for row, found in zip(expected, top, strict=True):
        assert list(found) == row.topk(3).indices.tolist()
        assert list(found.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)


def test_a_chat_of_ten_turns_computes_every_token_once() -> None:
    engine = engine_of(32)
    text: list[int] = []
    for turn, prompt in enumerate(prompts(10, seed=6, longest=6)):
        text += prompt
        id = engine.add(text, SampleParams(max_tokens=5, seed=turn))
        text += run(engine, [id])[id, 0][0]
        assert engine.stats().computed_tokens == len(text) - 1, "a token was computed twice"  # the last one: not yet
    stats = engine.stats()
    assert stats.prompt_tokens == stats.prefix_cache_queries
    assert stats.prompt_tokens_cached == stats.prefix_cache_hits
    assert stats.prompt_tokens - stats.prompt_tokens_cached + stats.generation_tokens - 10 == stats.computed_tokens


@pytest.mark.parametrize("step_tokens", [3, 100])
def test_of_requests_that_begin_alike_at_once_one_computes_for_all(step_tokens: int) -> None:
    engine = engine_of(32, step_tokens=step_tokens)
    common = prompts(1)[0] * 2
    size = len(common) // BLOCK * BLOCK  # whole blocks are waited for
    asked = [[*common[:size], n] for n in range(5)]
    run(engine, [engine.add(prompt, SampleParams(max_tokens=1, seed=1)) for prompt in asked])
    assert engine.stats().computed_tokens == size + 5


class Poisoned(NullRunner):
    """Logits are not finite where token 7 is in the step."""

    def forward(self, batch: Batch) -> torch.Tensor:
        logits = super().forward(batch).clone()
        owner = np.repeat(np.arange(len(batch.counts)), batch.counts)
        for row, place in enumerate(batch.wanted.tolist()):
            if 7 in batch.tokens[owner == owner[place]]:
                logits[row, 3] = math.nan if row % 2 else math.inf
        return logits


def test_logits_that_are_not_finite_end_one_request_and_its_blocks() -> None:
    engine = Engine(Poisoned(MODEL.config, VOCAB, 16))
    params = SampleParams(max_tokens=4, temperature=0)
    good, bad = engine.add([2] * 20, params), engine.add([3] * 33 + [7], params)
    replies = run(engine, [good, bad])
    assert replies == {(good, 0): ([1] * 4, "length"), (bad, 0): ([], "error")}
    assert engine.stats().request_success == {"stop": 0, "length": 1, "timeout": 0, "error": 1}
    hits = engine.stats().prefix_cache_hits
    run(engine, [engine.add([3] * 40, params)])
    assert engine.stats().prefix_cache_hits == hits, "blocks of a broken request were used again"
    run(engine, [engine.add([2] * 40, params)])
    assert engine.stats().prefix_cache_hits == hits + 20


def test_cancel_at_any_moment_frees_and_disturbs_nobody() -> None:
    params = SampleParams(max_tokens=8, seed=4)
    asked = prompts(5, seed=3, longest=20)
    expected = [generate(MODEL, prompt, params) for prompt in asked]
    for victim in range(5):
        for moment in range(0, 18, 3):
            engine = engine_of(4, max_batch=2, step_tokens=10)
            ids = [engine.add(prompt, params) for prompt in asked]
            got: dict[int, list[int]] = defaultdict(list)
            steps, after = 0, None
            while load(engine) or steps <= moment:
                if steps == moment:
                    engine.cancel(ids[victim])
                    engine.cancel(ids[victim])  # twice is no error
                    after = list(got[ids[victim]])
                for output in engine.step():
                    got[output.id] += output.tokens
                steps += 1
            assert got[ids[victim]] == after, "a cancelled request went on"
            assert all(got[ids[n]] == expected[n] for n in range(5) if n != victim)
            assert engine.stats().kv_cache_usage_perc == 0


def test_an_idle_engine_has_nothing_to_say() -> None:
    assert engine_of().step() == []


def test_output_tells_what_one_step_added() -> None:
    engine = engine_of()
    id = engine.add([1], SampleParams(max_tokens=1, temperature=0))
    [output] = engine.step()
    assert isinstance(output, Output)
    assert (output.id, output.index, len(output.tokens), output.finish) == (id, 0, 1, "length")


@pytest.mark.parametrize(
    ("tokens", "params", "said"),
    [
        ([], SampleParams(1), "tokens is empty"),
        ([1, VOCAB], SampleParams(1), "tokens holds 61; the vocabulary"),
        ([1, -1], SampleParams(1), "tokens holds -1"),
        ([1, 2**70], SampleParams(1), "tokens holds 1180591620717411303424"),
        ([1, 1.5], SampleParams(1), "tokens holds 1.5"),
        ([1], SampleParams(1, stop=(VOCAB,)), "stop holds 61"),
        ([1] * CONTEXT, SampleParams(1), "tokens are 128; the context is 128"),
        ([1] * 65, SampleParams(1), "tokens are 65; the cache holds 64"),
        ([1], SampleParams(CONTEXT + 1), "max_tokens is 129; the context is 128"),
    ],
)
def test_a_bad_request_is_refused_and_named(tokens: list[int], params: SampleParams, said: str) -> None:
    engine = engine_of(4)
    [prompt] = prompts(1)
    good = engine.add(prompt, SampleParams(max_tokens=6, seed=1))
    engine.step()
    with pytest.raises(ValueError, match=f"^{said}"):
        engine.add(tokens, params)
    assert run(engine, [good])[good, 0][0] == generate(MODEL, prompt, SampleParams(max_tokens=6, seed=1))[1:]
    assert engine.step() == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"step_tokens": 0}, "step_tokens is 0"),
        ({"speculate": -1}, "speculate is -1"),
        ({"stop": [VOCAB]}, "stop holds 61"),
    ],
)
def test_an_engine_that_could_run_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        engine_of(**settings)
    with pytest.raises(ValueError, match="id is 0"):
        engine_of().cancel(0)
