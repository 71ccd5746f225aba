"""The benchmarks, with the smallest sizes they can have: what they print, and that each option does something."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nanochat.bench import decode, measure, train
from nanochat.config import ModelConfig
from nanochat.flops import parameters
from pipelines import cli

KEYS = ["bench", "case", "unit", "value", "baseline", "baseline_value", "ratio", "runs", "min", "max"]
KEYS += ["commit", "machine"]
TRAIN = ("--depth", "1", "--steps", "1")
DECODE = ("--depth", "1", "--batch", "1", "3", "--runs", "2")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "BATCH_TOKENS", 512)
    monkeypatch.setattr(train, "WARM_UP", 1)
    monkeypatch.setattr(decode, "NEW", 3)


class Bench:
    """Runs a benchmark in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, name: str, *options: str) -> str:
        assert {"train": train, "decode": decode}[name].main(["--threads", "1", *options]) == 0
        out, err = self.capture.readouterr()
        assert err == ""
        return out

    def rows(self, name: str, *options: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(name, "--json", *options).splitlines()]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(capsys)


@pytest.mark.parametrize(("name", "options", "cases"), [("train", TRAIN, 1), ("decode", DECODE, 2)])
def test_a_json_line_a_measurement(bench: Bench, name: str, options: Sequence[str], cases: int) -> None:
    rows = bench.rows(name, *options, "--commit", "abc")
    assert len(rows) == cases
    for row in rows:
        assert list(row)[: len(KEYS)] == KEYS
        assert (row["bench"], row["unit"], row["commit"]) == (name, "tokens/s", "abc")
        assert (row["baseline"], row["baseline_value"], row["ratio"]) == (None, None, None)
        assert 0 < row["min"] <= row["value"] <= row["max"]
        assert row["machine"]["threads"] == 1
        assert row["machine"]["processor"]
        assert (row["machine"]["torch"], row["machine"]["cores"] > 0) == (torch.__version__, True)
        assert row["parameters"] == parameters(ModelConfig(depth=1, context=512, head_dim=64), row["vocabulary"])


def test_options_decide_what_is_measured(bench: Bench) -> None:
    [row] = bench.rows("train", "--depth", "2", "--steps", "3", "--precision", "fp32")
    assert (row["case"], row["runs"], row["precision"], row["commit"]) == ("depth 2", 3, "fp32", None)
    assert row["peak_bytes"] > 4 * 4 * row["parameters"]  # weights, gradients and two moments of most
    rows = bench.rows("decode", "--depth", "2", "--batch", "2", "--runs", "1")
    assert [(row["case"], row["runs"], row["batch"]) for row in rows] == [("depth 2, batch 2", 1, 2)]
    assert rows[0]["prefill_tokens_per_s"] > rows[0]["value"]


@pytest.mark.parametrize(("name", "options"), [("train", TRAIN), ("decode", DECODE)])
def test_a_table_for_people(bench: Bench, name: str, options: Sequence[str]) -> None:
    machine, head, case, *_ = bench(name, *options).splitlines()
    assert f"torch {torch.__version__}" in machine
    assert head.split() == ["case", "tokens/s", "min", "max", "runs"]
    assert case.startswith("depth 1")


def test_bf16_where_the_processor_has_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (False, True):
        monkeypatch.setattr(measure, "has_bf16", lambda _, able=able: able)
        assert bench.rows("train", *TRAIN)[0]["precision"] == ("bf16" if able else "fp32")


def test_decode_counts_the_tokens_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 2.0, 5.0))
    monkeypatch.setattr("nanochat.bench.decode.time.perf_counter", lambda: next(clock))
    model = decode.random_model(ModelConfig(depth=1, context=512, head_dim=64), torch.float32, "cpu")
    prefill, rate = decode.replies(model, 2)
    assert prefill == 2 * decode.PROMPT / 2.0
    assert rate == 2 * (decode.NEW - 1) / 3.0


def test_training_does_not_count_the_warm_up() -> None:
    assert len(train.step_rates(ModelConfig(depth=1, context=512, head_dim=64), 2, "cpu", "fp32")) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--depth", "0"), "'0' is not a whole number of 1 or more"),
        (("--threads", "many"), "'many' is not a whole number"),
        pytest.param(
            ("--device", "cuda"),
            "torch finds no CUDA here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_a_wrong_option_is_refused(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("dirty", "told"), [(False, "0a1b"), (True, "0a1b-dirty"), (None, None)])
def test_the_verb_passes_options_and_the_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dirty: bool | None, told: str | None
) -> None:
    monkeypatch.setattr(cli, "made_by", lambda: {"commit": None if dirty is None else "0a1b", "dirty": dirty})
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert cli.main(["bench", "train", *TRAIN, "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == told


def test_the_modules_run_by_themselves() -> None:
    for name in ("train", "decode"):
        done = subprocess.run(
            [sys.executable, "-m", f"nanochat.bench.{name}", "--help"], capture_output=True, text=True, check=True
        )
        assert f"nanochat bench {name}" in done.stdout
