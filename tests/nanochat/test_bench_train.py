"""The benchmark of training: that both sides train the same model on the same text, and what is said of them."""

import json
from typing import Any

import pytest
import torch

from nanochat.bench import train, trainer
from nanochat.bench.trainer import CONTEXT, OPTIM, VOCABULARY, WARM_UP, Text, Trainer, TrainSetup
from nanochat.config import ModelConfig
from nanochat.flops import flops_per_token
from nanochat.train import TrainPlan
from nanochat.train import train as steps_of
from tests.nanochat.test_bench import Here

CONFIG = ModelConfig(depth=1, context=CONTEXT, head_dim=64)
SMALL = ("--depth", "1", "--steps", "5", "--threads", "1", "--precision", "fp32", "--micro-batch", "1", "--json")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a step, both sides in this process, and the baseline as torch runs it without its compiler."""
    monkeypatch.setattr(trainer, "BATCH_TOKENS", CONTEXT)
    monkeypatch.setattr(train, "Worker", Here)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def setup(**changes: Any) -> TrainSetup:
    told = {"config": CONFIG, "steps": 6, "precision": "fp32", "device": "cpu", "threads": 1, "micro_batch": 1}
    return TrainSetup(**(told | changes))


def rows(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[list[dict[str, Any]], str]:
    assert train.main([*SMALL, *options]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_the_baseline_trains_as_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step the same losses: the same model, batches, schedule, clipping and optimizers."""
    monkeypatch.setattr(trainer, "BATCH_TOKENS", 2 * CONTEXT)
    losses = []
    for baseline in (False, True):
        side = Trainer(setup(baseline=baseline))
        assert len(side.rates(6 - WARM_UP)) == 6 - WARM_UP
        losses.append(side.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.02


def test_the_text_can_be_learnt_and_is_the_same_for_all() -> None:
    (batch,), count = Text(micro_batch=8).step(3)
    (again,), _ = Text(micro_batch=1).step(3)
    (other,), _ = Text(micro_batch=1).step(4)
    assert count == CONTEXT
    assert torch.equal(batch.tokens, again.tokens)
    assert not torch.equal(batch.tokens, other.tokens)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    follow = {int(token) for step in range(20) for token in _after(int(batch.tokens[0, 0]), step)}
    assert len(follow) <= trainer.FOLLOWERS < VOCABULARY


def _after(token: int, step: int) -> torch.Tensor:
    (batch,), _ = Text(micro_batch=1).step(step)
    return batch.targets[batch.tokens == token]


def test_a_comparison_says_what_each_side_cost(capsys: pytest.CaptureFixture[str]) -> None:
    [one, two], _ = rows(capsys, "--against", "nanochat-like", "fp32")
    assert (one["baseline"], two["baseline"]) == ("nanochat-like", "fp32")
    for row in (one, two):
        assert row["runs"] == train.LEAST_RUNS
        assert row["ratio"] == pytest.approx(row["value"] / row["baseline_value"])
        assert row["baseline_min"] <= row["baseline_value"] <= row["baseline_max"]
        share = flops_per_token(CONFIG, VOCABULARY) / row["peak_flops_per_s"]["bf16"]
        assert row["peak_share"] == pytest.approx(row["value"] * share)
        assert row["baseline_peak_share"] == pytest.approx(row["baseline_value"] * share)
        assert row["peak_bytes_ratio"] == pytest.approx(row["peak_bytes"] / row["baseline_peak_bytes"])
        assert row["loss_change"] == pytest.approx(row["loss"] / row["baseline_loss"] - 1)
    assert two["loss_change"] == pytest.approx(0, abs=1e-5)  # both in fp32
    assert abs(one["loss_change"]) > 1e-7  # bf16 beside fp32


def test_a_baseline_that_leaves_the_machine_idle_is_not_fair(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for peak, said in ((1e16, "reaches 0% of the 10000000 GFLOP/s that fp32"), (1.0, "")):
        peaks = {"fp32": peak, "bf16": 1e16 / peak}  # what it computes in decides
        monkeypatch.setattr(Trainer, "peak_flops_per_s", lambda self, precision, peaks=peaks: peaks[precision])
        _, err = rows(capsys, "--against", "fp32")
        assert said in err
        assert bool(said) == ("no fair baseline" in err)


@pytest.mark.parametrize("options", [("--runs", "4", "--steps", "8"), ("--runs", "5", "--steps", "7")])
def test_a_comparison_needs_five_equal_runs(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--against", "fp32", *options])
    assert "at least 5 runs of equally many steps; try --steps 5 --runs 5" in capsys.readouterr().err


def test_alone_each_step_is_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    [row], err = rows(capsys)
    assert (row["runs"], row["baseline"], err) == (5, None, "")
    assert row["loss"] < 9.1
    assert row["first_step_s"] > 0
    assert row["mfu"] == pytest.approx(row["value"] * flops_per_token(CONFIG, VOCABULARY) / row["peak_flops_per_s"])
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert row["shares"]["backward"] > row["shares"]["data"] >= 0


def test_ours_is_the_loop_that_trains_models() -> None:
    side = Trainer(setup())
    side.rates(6 - WARM_UP)
    model = trainer.GPT(CONFIG, VOCABULARY).reset(0)
    plan = TrainPlan(steps=6, batch_tokens=CONTEXT, optim=OPTIM)
    done = steps_of(model, trainer.build_optimizer(model, OPTIM, "fp32"), Text(1).step, plan)
    assert [step.loss for step in done] == side.losses
