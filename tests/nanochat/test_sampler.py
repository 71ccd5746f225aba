"""The sampler against its distribution, computed independently, and against wrong parameters."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nanochat.engine.sampler import SampleParams, choose, support, uniform
from tests.reference.generate import pick, weights_of

LOGITS = np.array([1.5, -0.3, 0.7, 0.7, 2.0, -4.0, 0.7, 1.9], dtype=np.float32)
SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 3},
    {"top_k": 4},  # cuts through three equal logits
    {"top_p": 0.8},
    {"top_p": 0.6, "top_k": 5, "temperature": 1.3},
    {"top_k": 100, "top_p": 1.0},
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_follow_the_filtered_distribution(setting: dict[str, Any]) -> None:
    params = SampleParams(max_tokens=1, **setting)
    draws = 4_000
    counts = np.bincount([choose(LOGITS, params, 7, position)[0] for position in range(draws)], minlength=len(LOGITS))
    weights = np.array(weights_of(LOGITS.tolist(), params))
    possible = weights > 0
    assert not counts[~possible].any(), "a token outside the support was drawn"
    expected = draws * weights[possible] / weights.sum()
    # The seed is fixed, so this never flakes; a wrong distribution of this size has p far below 1e-10.
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_draw_is_the_one_of_the_slow_sampler(setting: dict[str, Any]) -> None:
    params = SampleParams(max_tokens=1, seed=11, **setting)
    for position in range(200):
        assert choose(LOGITS, params, 11, position)[0] == pick(LOGITS.tolist(), params, position)


def test_random_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    numbers = [uniform(seed, position) for seed in range(40) for position in range(100)]
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert len(set(numbers)) == len(numbers)
    assert uniform(2**64 - 1, 5) == np.random.Generator(np.random.Philox(key=2**64 - 1, counter=5)).random()


def test_neighbouring_positions_are_independent() -> None:
    numbers = np.array([uniform(3, position) for position in range(4_001)])
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05  # 3 standard errors of 4,000 pairs


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    assert choose(np.array([0, 3, 3, 1], dtype=np.float32), SampleParams(1, temperature=0), 0, 0)[0] == 1


def test_equal_tokens_at_the_border_rank_by_id() -> None:
    flat = np.zeros(6)
    assert support(flat, SampleParams(1, top_k=2))[0].tolist() == [0, 1]
    assert support(flat, SampleParams(1, top_p=0.5))[0].tolist() == [0, 1, 2]


def test_a_filter_that_rules_nothing_out_changes_nothing() -> None:
    for position in range(100):
        plain = choose(LOGITS, SampleParams(1), 2, position)
        assert choose(LOGITS, SampleParams(1, top_k=len(LOGITS)), 2, position) == plain
        assert choose(LOGITS, SampleParams(1, top_p=1.0), 2, position) == plain


def test_top_p_zero_and_tiny_temperatures_are_greedy() -> None:
    for params in (
        SampleParams(1, top_p=0.0),
        SampleParams(1, temperature=1e-300),
        SampleParams(1, temperature=5e-324),
    ):
        assert {choose(LOGITS, params, 1, position)[0] for position in range(50)} == {4}


def test_logprob_is_the_models_own() -> None:
    exact = [float(x) - math.log(math.fsum(math.exp(float(y)) for y in LOGITS)) for x in LOGITS]
    for position in range(20):
        token, logprob = choose(LOGITS, SampleParams(1, temperature=3.0, top_k=4), 5, position)
        assert logprob == pytest.approx(exact[token], abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_are_an_error(bad: float) -> None:
    with pytest.raises(FloatingPointError, match="position 3"):
        choose(np.array([0.0, bad], dtype=np.float32), SampleParams(1), 0, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", bad) for bad in (0, -1, 1.5, True, None)),
        *(("temperature", bad) for bad in (-0.1, math.nan, math.inf, "hot", None, True)),
        *(("top_k", bad) for bad in (0, -3, 2.0)),
        *(("top_p", bad) for bad in (-0.1, 1.01, math.nan, 10**400)),
        *(("seed", bad) for bad in (-1, 2**64, 0.5)),
        ("stop", (-1,)),
        ("stop", ("x",)),
    ],
)
def test_a_wrong_parameter_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} is"):
        SampleParams(**{"max_tokens": 1, field: value})
