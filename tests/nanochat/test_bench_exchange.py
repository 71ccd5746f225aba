"""What hides behind the backward pass: each way exchanges what its name says, and processes are measured so."""

import json

import pytest
import torch
from torch import Tensor

from nanochat.bench import exchange
from nanochat.bench.exchange import AFTER, MEMORY, ONE_NUMBER, OVERLAP, VOCABULARY, WAYS, Steps, config_of
from nanochat.model import weight_shapes
from nanochat.parallel import Pending, Ranks

WEIGHTS = sum(torch.Size(shape).numel() for shape in weight_shapes(config_of(1), VOCABULARY).values())


class Alone(Ranks):
    """The first of two ranks, which writes down what it would sum."""

    started: list[int]

    def start_sum(self, tensor: Tensor) -> Pending:
        self.started.append(tensor.numel())
        return lambda: None

    def most(self, value: float) -> float:
        return value


@pytest.mark.parametrize(
    ("way", "while_backward", "summed"),
    [(OVERLAP, WEIGHTS, WEIGHTS + 1), (AFTER, 0, WEIGHTS + 1), (MEMORY, 0, 1), (ONE_NUMBER, 0, 1)],
)
def test_a_way_exchanges_what_it_says(
    way: str, while_backward: int, summed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Alone.started = []
    monkeypatch.setattr(exchange, "Ranks", Alone)
    both = [torch.zeros(WEIGHTS), torch.ones(WEIGHTS)]
    monkeypatch.setattr(exchange, "shared_zeros", lambda numel, ranks: both)
    steps = Steps(0, 1, "fp32", 1 << 20)
    add, seen = steps._add, list[int]()

    def listened(*told: object) -> Tensor:
        nats: Tensor = add(*told)  # type: ignore[arg-type]
        seen.append(sum(Alone.started))
        both[0] += 1
        return nats

    monkeypatch.setattr(steps, "_add", listened)
    step_s, last_s, first_s = steps.run(way, 1)
    assert (seen, sum(Alone.started)) == ([while_backward], summed)
    assert step_s > last_s == first_s >= 0
    mine, others = both[1].tensor_split(2)
    assert (int(mine.min()), int(others.min())) == (2 if way == MEMORY else 1, 1)


def test_two_processes_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert exchange.main(["--depth", "1", "--precision", "fp32", "--runs", "2", "--steps", "1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case"] for row in rows] == [f"depth 1, sums {way}" for way in WAYS]
    overlap, after, _, _ = rows
    assert (overlap["baseline"], overlap["baseline_value"]) == (AFTER, after["value"])
    assert overlap["ratio"] == pytest.approx(after["value"] / overlap["value"])
    for row in rows:
        assert row["gradient_bytes"] == 4 * WEIGHTS
        assert 0 < row["min"] <= row["value"] <= row["max"]
        assert row["value"] <= row["first_waits_s"] < row["step_s"]
