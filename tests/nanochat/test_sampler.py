"""The samplers against a slow one in plain Python, against transformers, and against wrong parameters."""

import math
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanochat.engine.device_sampler import sample_on_device
from nanochat.engine.sampler import Draw, Drawn, SampleParams, Uniform, sample
from tests.reference.generate import logprobs_of, penalised, pick, weights_of

Sampler = Callable[[Tensor, list[Draw]], list[Drawn | None]]

LOGITS = [1.5, -0.3, 0.7, 0.7, 2.0, -4.0, 0.7, 1.9]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 3},
    {"top_k": 4},  # cuts through three equal logits
    {"top_p": 0.8},
    {"top_p": 0.6, "top_k": 5, "temperature": 1.3},
    {"top_k": 100, "top_p": 1.0},
    {"min_p": 0.3},
    {"min_p": 0.1, "top_p": 0.95, "temperature": 2.0},
    {"repetition_penalty": 1.8, "top_k": 5},
    {"repetition_penalty": 0.4},
]
SEEN = [4, 1, 4, 7]


@pytest.fixture(params=[sample, sample_on_device], ids=["cpu", "device"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """On a CPU tensor the second does what it does on a GPU."""
    sampler: Sampler = request.param
    return sampler


def token_of(sampler: Sampler, logits: list[float], params: SampleParams, seed: int = 0, position: int = 0) -> int:
    (drawn,) = sampler(torch.tensor([logits]), [Draw(params, seed, position, SEEN)])
    assert drawn
    return drawn.token


def counted(sampler: Sampler, logits: list[float], params: SampleParams, draws: int) -> np.ndarray:
    rows = torch.tensor(logits).expand(draws, -1).contiguous()
    drawn = sampler(rows, [Draw(params, 7, position, SEEN) for position in range(draws)])
    return np.bincount([one.token for one in drawn if one], minlength=len(logits))


def random_params(dice: random.Random, size: int) -> SampleParams:
    return SampleParams(
        1,
        temperature=dice.choice([0, 1e-300, 1e-6, 1e-3, 0.3, 0.7, 1, 1.0, 1.5, 30.0, 1e6]),
        top_k=dice.choice([None, None, 1, 2, 5, size - 1, size, 10**9, dice.randint(1, size)]),
        top_p=dice.choice([None, None, 0.0, 1e-12, 0.1, 0.5, 0.9, 0.99, 1 - 1e-9, 1.0, dice.random()]),
        min_p=dice.choice([None, None, None, 0.0, 0.01, 0.3, 1.0, dice.random() ** 4]),
        repetition_penalty=dice.choice([1.0, 1, 1.0, 1.3, 0.5, 1e-3, 1e3]),
        seed=dice.choice([0, 2**64 - 1, dice.getrandbits(64), dice.getrandbits(10)]),
        n=16,
        logprobs=dice.choice([None, None, 0, 1, 5, 20]),
    )


def random_row(dice: random.Random, size: int) -> list[float]:
    spread = dice.choice([0.0, 1e-6, 0.3, 2.0, 8.0])
    row = [dice.gauss(0, spread) for _ in range(size)]
    kind = dice.randrange(6)
    if kind == 0:  # many equal ones
        row = [float(round(logit)) for logit in row]
    elif kind == 1:  # one far above the rest
        row[dice.randrange(size)] = 15.0
    elif kind == 2:  # one far below
        row[dice.randrange(size)] = -1e4
    elif kind == 3:  # 0 and -0
        row = [dice.choice([0.0, -0.0, logit]) for logit in row]
    return torch.tensor(row).tolist()  # as fp32


@pytest.mark.parametrize(("size", "rounds"), [(2, 10), (8, 40), (50, 20), (600, 4), (5_000, 1)])
def test_every_row_of_a_mixed_batch_is_drawn_as_alone_and_slowly(sampler: Sampler, size: int, rounds: int) -> None:
    dice = random.Random(size)
    for _ in range(rounds):
        logits = [random_row(dice, size) for _ in range(24)]
        indices = [dice.randrange(16) for _ in logits]
        settings = [random_params(dice, size) for _ in logits]
        seen = [dice.choices(range(size), k=dice.randint(1, 30)) for _ in logits]
        position = dice.choice([1, 77, 2**40])
        draws = [
            Draw(params, params.seed + index, position, text)  # type: ignore[operator]
            for params, index, text in zip(settings, indices, seen, strict=True)
        ]
        for row, params, index, text, drawn in zip(
            logits, settings, indices, seen, sampler(torch.tensor(logits), draws), strict=True
        ):
            assert drawn
            assert drawn.token == pick(row, params, position, text, index), params
            if params.logprobs is None:
                assert (drawn.logprob, drawn.top) == (None, {})
                continue
            exact, likeliest = logprobs_of(row, params.logprobs)
            assert drawn.logprob == pytest.approx(exact[drawn.token], abs=1e-11)
            assert list(drawn.top) == likeliest
            assert list(drawn.top.values()) == pytest.approx([exact[token] for token in likeliest], abs=1e-11)


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.5, 3.0])
@pytest.mark.parametrize("params", [{"top_p": 0.9}, {"top_k": 3_000, "top_p": 0.7}, {"top_k": 700}, {"min_p": 0.02}])
def test_wide_filters_of_a_large_vocabulary(sampler: Sampler, spread: float, params: dict[str, Any]) -> None:
    """The rounds above seldom reach beyond the few tokens that both samplers look at first."""
    dice = random.Random(4)
    row = torch.tensor([dice.gauss(0, spread) for _ in range(8_000)]).tolist()
    for temperature in (1e-2, 1.0, 1e5):
        setting = SampleParams(1, temperature=temperature, seed=5, **params)
        drawn = sampler(torch.tensor([row] * 2), [Draw(setting, 5, position, ()) for position in range(2)])
        assert [one.token for one in drawn if one] == [pick(row, setting, position) for position in range(2)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_follow_the_filtered_distribution(sampler: Sampler, setting: dict[str, Any]) -> None:
    params = SampleParams(1, **setting)
    counts = counted(sampler, LOGITS, params, 4_000)
    weights = np.array(weights_of(penalised(LOGITS, params, SEEN), params))
    possible = weights > 0
    assert not counts[~possible].any(), "a token outside the support was drawn"
    expected = 4_000 * weights[possible] / weights.sum()
    # The seed is fixed, so this never flakes; a wrong distribution of this size has p far below 1e-10.
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_follow_transformers(sampler: Sampler, setting: dict[str, Any]) -> None:
    logits = [1.5, -0.3, 0.7, 0.6, 2.0, -4.0, 0.8, 1.9, -1.0, 0.1]  # no equal ones: there transformers has no rule
    steps = LogitsProcessorList()
    if "repetition_penalty" in setting:
        steps.append(RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"]))
    if "temperature" in setting:
        steps.append(TemperatureLogitsWarper(setting["temperature"]))
    if "top_k" in setting:
        steps.append(TopKLogitsWarper(setting["top_k"]))
    if "top_p" in setting:
        steps.append(TopPLogitsWarper(setting["top_p"]))
    if "min_p" in setting:
        steps.append(MinPLogitsWarper(setting["min_p"]))
    shares = steps(torch.tensor([SEEN]), torch.tensor([logits])).double().softmax(dim=1)[0].numpy()
    counts = counted(sampler, logits, SampleParams(1, **setting), 4_000)
    assert not counts[shares == 0].any()
    assert stats.chisquare(counts[shares > 0], 4_000 * shares[shares > 0] / shares.sum()).pvalue > 1e-3


def test_random_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    number = Uniform()
    numbers = [number(seed, position) for seed in range(40) for position in range(100)]
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (3, 5), (2**64 - 1, 2**33), (2**64 + 14, 1)])
def test_random_numbers_are_numpys(seed: int, position: int) -> None:
    number = Uniform()
    number(9, 9)  # leaves no trace
    assert number(seed, position) == np.random.Generator(np.random.Philox(key=seed, counter=position)).random()


def test_neighbouring_positions_are_independent() -> None:
    number = Uniform()
    numbers = np.array([number(3, position) for position in range(4_001)])
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05  # 3 standard errors of 4,000 pairs


def test_greedy_takes_the_lowest_of_equal_tokens(sampler: Sampler) -> None:
    assert token_of(sampler, [0, 3, 3, 1], SampleParams(1, temperature=0)) == 1


def test_greedy_heeds_the_penalty(sampler: Sampler) -> None:
    assert token_of(sampler, LOGITS, SampleParams(1, temperature=0, repetition_penalty=1.5)) == 0


def test_a_token_seen_twice_is_penalised_once(sampler: Sampler) -> None:
    params = SampleParams(1, temperature=0, repetition_penalty=2)
    for seen in ([1], [1, 1, 1], np.array([1, 1])):
        (drawn,) = sampler(torch.tensor([[0.9, 2.0, -3.0]]), [Draw(params, 0, 0, seen)])  # type: ignore[arg-type]
        assert drawn
        assert drawn.token == 1


def test_a_filter_that_rules_nothing_out_changes_nothing(sampler: Sampler) -> None:
    for position in range(100):
        plain = token_of(sampler, LOGITS, SampleParams(1), 2, position)
        for nothing in ({"top_k": len(LOGITS)}, {"top_p": 1.0}, {"min_p": 0.0}, {"repetition_penalty": 1}):
            assert token_of(sampler, LOGITS, SampleParams(1, **nothing), 2, position) == plain


@pytest.mark.parametrize(
    "setting", [{"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 1e-300}, {"temperature": 5e-324}]
)
def test_the_narrowest_settings_are_greedy(sampler: Sampler, setting: dict[str, Any]) -> None:
    assert counted(sampler, LOGITS, SampleParams(1, **setting), 50)[4] == 50


def test_logits_are_neither_changed_nor_kept(sampler: Sampler) -> None:
    dice = random.Random(1)
    buffer = torch.tensor([random_row(dice, 70) for _ in range(12)])
    view = buffer[2:10, 3:]  # rows that do not touch each other
    draws = [Draw(random_params(dice, 67), 1, 2, SEEN) for _ in view]
    expected = sampler(view.clone(), draws)
    before = buffer.clone()
    drawn = sampler(view, draws)
    assert torch.equal(buffer, before)
    buffer.fill_(0)
    assert drawn == expected  # log-probabilities too, bit for bit


def test_no_row_depends_on_another() -> None:
    dice = random.Random(2)
    rows = torch.tensor([random_row(dice, 3_001) for _ in range(20)])
    draws = [Draw(random_params(dice, 3_001), 1, 2, SEEN) for _ in rows]
    alone = [sample(row[None], [draw])[0] for row, draw in zip(rows, draws, strict=True)]
    assert sample(rows, draws) == alone  # bit for bit


def test_no_rows_no_tokens(sampler: Sampler) -> None:
    assert sampler(torch.empty(0, 5), []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("setting", [{"temperature": 0}, {}, {"top_p": 0.5, "logprobs": 2}, {"repetition_penalty": 2}])
def test_a_broken_row_yields_nothing_and_spoils_no_other(sampler: Sampler, bad: float, setting: dict[str, Any]) -> None:
    rows = torch.tensor([LOGITS, LOGITS, LOGITS])
    rows[1, 3] = bad
    draw = Draw(SampleParams(1, **setting), 3, 4, SEEN)
    first, broken, last = sampler(rows, [draw, draw, draw])
    assert broken is None
    assert first == last == sampler(rows[:1], [draw])[0]


def test_parameters_can_be_made_where_there_is_no_torch() -> None:
    """A gateway that only passes requests on starts seconds earlier and a few hundred MB smaller."""
    code = "import sys, nanochat.engine.sampler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


NO_NUMBERS = (-0.1, math.nan, math.inf, -math.inf, "hot", True, 10**400, -(10**400), 10**5_000, [1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", bad) for bad in (0, -1, 1.5, True, None, 2**31, 10**5_000, math.nan)),
        *(("temperature", bad) for bad in (*NO_NUMBERS, None)),
        *(("top_k", bad) for bad in (0, -3, 2.0, True, 2**31)),
        *(("top_p", bad) for bad in (*NO_NUMBERS, 1.01)),
        *(("min_p", bad) for bad in (*NO_NUMBERS, 1.01)),
        *(("repetition_penalty", bad) for bad in (*NO_NUMBERS, 0, 0.0, 1e-4, 1e4, None)),
        *(("seed", bad) for bad in (-1, 2**64, 0.5, True, 10**5_000)),
        *(("stop", bad) for bad in ((-1,), ("x",), (1.0,), (True,), (2**31,), None, [1], "x", 3)),
        *(("n", bad) for bad in (0, -1, 17, 1.0, True, None)),
        *(("logprobs", bad) for bad in (-1, 21, 1.0, True)),
        *(("timeout_s", bad) for bad in (*NO_NUMBERS, 0, 0.0)),
    ],
    ids=lambda value: f"{value!r:.20}" if not isinstance(value, int) or abs(value) < 10**4_000 else "endless",
)
def test_a_wrong_parameter_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} is .*must be"):
        SampleParams(**{"max_tokens": 1, field: value})


def test_the_outermost_parameters_are_accepted() -> None:
    SampleParams(2**31 - 1, temperature=0, top_k=1, top_p=0, min_p=0, repetition_penalty=1e-3, seed=0, n=16, logprobs=0)
    SampleParams(1, 1e6, 2**31 - 1, 1, 1, 1e3, seed=2**64 - 1, stop=(0, 2**31 - 1), n=1, logprobs=20, timeout_s=1e-9)
