"""Ranks that sum their gradients against one process that accumulates them; what is exchanged, and when."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat import parallel
from nanochat.config import OptimConfig
from nanochat.data import Batch
from nanochat.model import weight_shapes
from nanochat.optim import build_optimizer, merged
from nanochat.parallel import Exchange, Pending, Ranks
from nanochat.train import TrainPlan, flat_gradient, train
from tests.nanochat.ranks import CONTEXT, Case, run
from tests.nanochat.sizes import VOCAB, filled, small, some_tokens
from tests.reference.state import state_bytes

LONG = 50  # steps
CASES = [
    Case("one", world=1, rows=4, micro=2, steps=LONG),
    *(Case(f"ddp-{world}", world, rows=4, micro=2, steps=LONG) for world in (2, 3, 4)),
    *(Case(f"zero-{world}", world, rows=4, micro=2, steps=LONG, shard=True) for world in (2, 3, 4)),
    *(Case(f"sent-{world}", world, rows=4, micro=2, steps=LONG, messages=True) for world in (2, 4)),
    Case("sent-zero-3", 3, rows=4, micro=2, steps=LONG, shard=True, messages=True),
    Case("one-by-one", world=1, rows=4, micro=1, steps=LONG),
    Case("one-bf16", world=1, rows=4, micro=2, precision="bf16"),
    Case("two-bf16", world=2, rows=4, micro=2, precision="bf16"),
    Case("zero-bf16", world=2, rows=4, micro=2, precision="bf16", shard=True),
    Case("one-adamw", world=1, rows=4, micro=2, optim="adamw"),
    Case("zero-adamw", world=3, rows=4, micro=2, optim="adamw", shard=True),
    Case("one-chat", world=1, rows=4, micro=4, chat=True),
    Case("three-chat", world=3, rows=4, micro=1, chat=True),
    Case("one-chat-few", world=1, rows=2, micro=2, chat=True),
    Case("three-chat-few", world=3, rows=2, micro=2, chat=True),  # rank 0 has no row
    Case("two-slow", world=2, rows=4, micro=2, slow_s=0.2, steps=4),
    Case("one-spoiled", world=1, rows=4, micro=2, spoiled=(4, math.nan)),
    Case("two-spoiled", world=2, rows=4, micro=2, spoiled=(4, math.nan)),
    Case("zero-spoiled", world=3, rows=4, micro=2, shard=True, spoiled=(4, math.inf)),
]

Result = dict[str, Tensor]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Case -> what each rank ended with."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, args=(CASES, folder), nprocs=4)
    return {case.name: [read(folder, case.name, rank) for rank in range(case.world)] for case in CASES}


def read(folder: Path, name: str, rank: int) -> Result:
    result, more = (load_file(folder / f"{name}-{rank}{end}.safetensors") for end in ("", "-more"))
    return {**result, **more}


def weights_and_losses(result: Result) -> Result:
    return {name: tensor for name, tensor in result.items() if name.startswith(("model.", "lm_head.", "losses"))}


def state_of(ranks: list[Result]) -> Result:
    """The optimizer's whole state."""
    return merged(
        {key.removeprefix("optim/"): value for key, value in result.items() if key.startswith("optim/")}
        for result in ranks
    )


def differing(a: Result, b: Result) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.slow
def test_training_moves_the_weights(results: dict[str, list[Result]]) -> None:
    """Else the others would compare nothing."""
    assert results["one"][0]["model.layers.0.mlp.fc2.weight"].abs().max() > 1e-3
    assert results["one"][0]["losses"][0] != results["one"][0]["losses"][-1]


@pytest.mark.slow
@pytest.mark.parametrize(("two", "one"), [("ddp-2", "one"), ("two-bf16", "one-bf16"), ("sent-2", "one")])
def test_two_ranks_are_two_accumulation_steps_bit_for_bit(results: dict[str, list[Result]], two: str, one: str) -> None:
    assert not differing(weights_and_losses(results[two][0]), weights_and_losses(results[one][0]))
    assert not differing(state_of(results[two]), state_of(results[one]))


@pytest.mark.slow
def test_in_shared_memory_four_ranks_are_four_accumulation_steps_bit_for_bit(results: dict[str, list[Result]]) -> None:
    four, one = (weights_and_losses(results[name][0]) for name in ("ddp-4", "one-by-one"))
    torch.testing.assert_close(four.pop("losses"), one.pop("losses"), rtol=1e-12, atol=0)  # nats are sent
    assert not differing(four, one)
    assert not differing(state_of(results["ddp-4"]), state_of(results["one-by-one"]))


@pytest.mark.slow
def test_gradients_are_sent_only_where_a_rank_can_share_no_memory(results: dict[str, list[Result]]) -> None:
    for name, ranks in results.items():
        for result in ranks[1:]:
            if name.startswith("sent-"):
                assert result["largest"] > 10_000
            else:
                assert result["largest"] == 3 * len(ranks)  # where each rank's memory is


@pytest.mark.slow
def test_all_ranks_end_with_the_same_bits(results: dict[str, list[Result]]) -> None:
    for ranks in results.values():
        for other in ranks[1:]:
            # losses may be NaN, which equals nothing
            first, second = (
                {**weights_and_losses(result), "losses": result["skipped"]} for result in (ranks[0], other)
            )
            assert not differing(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("many", "one"),
    [
        *((f"{way}-{world}", "one") for way in ("ddp", "zero") for world in (2, 3, 4)),
        ("sent-4", "one"),
        ("sent-zero-3", "one"),
        ("zero-adamw", "one-adamw"),
        ("three-chat", "one-chat"),
        ("three-chat-few", "one-chat-few"),
    ],
)
def test_other_worlds_differ_by_rounding_alone(results: dict[str, list[Result]], many: str, one: str) -> None:
    losses, expected = results[many][0]["losses"], results[one][0]["losses"]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_sharding_alone_changes_next_to_nothing(results: dict[str, list[Result]]) -> None:
    """bf16: how many matrices are iterated on together decides how a product is rounded."""
    for sharded, whole, most in (("zero-2", "ddp-2", 1e-5), ("zero-bf16", "two-bf16", 1e-3)):
        losses, expected = (results[name][0]["losses"] for name in (sharded, whole))
        torch.testing.assert_close(losses, expected, rtol=most, atol=0)
    for name, tensor in state_of(results["zero-4"]).items():
        torch.testing.assert_close(tensor, results["ddp-4"][0][f"optim/{name}"], rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero-2", "zero-3", "zero-4", "zero-adamw"])
def test_a_rank_keeps_the_state_that_was_computed(results: dict[str, list[Result]], name: str) -> None:
    shapes = weight_shapes(small(2, context=CONTEXT), VOCAB)
    ranks, kind = results[name], "adamw" if name.endswith("adamw") else "muon"
    kept = [int(result["kept_bytes"]) for result in ranks]
    assert kept == [state_bytes(shapes, kind, rank, len(ranks)) for rank in range(len(ranks))]
    whole = int(results["one-adamw" if kind == "adamw" else "one"][0]["kept_bytes"])
    if name != "zero-3":  # two matrices of a shape do not go into three
        assert max(kept) < whole / len(ranks) * 1.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "one"), [("two-spoiled", "one-spoiled"), ("zero-spoiled", None)])
def test_a_bad_gradient_of_one_rank_is_applied_by_none(
    results: dict[str, list[Result]], name: str, one: str | None
) -> None:
    for result in results[name]:
        assert result["skipped"].tolist() == [0] * 4 + [1] * 6
        assert int(result["optim/steps"]) == 9
        assert all(tensor.isfinite().all() for key, tensor in result.items() if key != "losses")
        if one is not None:
            assert torch.equal(result["lm_head.weight"], results[one][0]["lm_head.weight"])


@pytest.mark.slow
def test_all_ranks_know_how_much_longer_the_slowest_works(results: dict[str, list[Result]]) -> None:
    first, last = (result["skews"].tolist() for result in results["two-slow"])
    assert first == last
    assert first[0] == 0
    assert all(0.1 < skew < 2 for skew in first[1:])


@pytest.mark.slow
def test_a_number_is_compared_over_ranks(results: dict[str, list[Result]]) -> None:
    for result in results["ddp-4"]:
        assert result["most"].item() == 3
    assert Ranks(0, 1).most(-2.5) == -2.5


class Listening(Ranks):
    """Of two ranks, one that sums with zeros and notes what it was asked to sum."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.started: list[Tensor] = []
        self.waited = 0

    def start_sum(self, tensor: Tensor) -> Pending:
        self.started.append(tensor)
        return self._wait

    def most(self, value: float) -> float:
        return 1.0  # the other can share no memory

    def _wait(self) -> None:
        self.waited += 1


def test_buckets_hold_each_number_once_and_begin_at_the_end() -> None:
    model = filled(small(depth=3))
    weights = list(model.parameters())
    for bucket_bytes in (1, 40_000, 1 << 30):
        gradient, ranks = flat_gradient(model), Listening()
        Exchange(gradient, weights, ranks, bucket_bytes).finish()
        # Bytes from the end: head 7,808, fc2 and fc1 16,384 each, attention 16,384; 49,152 a block
        assert len(ranks.started) == {1: len(weights), 40_000: 4, 1 << 30: 1}[bucket_bytes]
        for bucket in ranks.started:
            bucket += 1
            assert bucket[-1] == gradient[bucket.storage_offset() + len(bucket) - 1] == 1
        assert torch.equal(gradient, torch.ones_like(gradient))
        places = [bucket.storage_offset() for bucket in ranks.started]
        assert places == sorted(places, reverse=True)
        assert ranks.waited == len(ranks.started)


def test_a_bucket_starts_when_it_and_those_before_it_are_final() -> None:
    model = filled(small())
    weights = list(model.parameters())
    ranks = Listening()
    exchange = Exchange(flat_gradient(model), weights, ranks, bucket_bytes=1)
    *others, second, first = weights
    for _ in range(2):  # steps
        ranks.started.clear()
        exchange.final(second)
        assert not ranks.started
        exchange.final(first)
        assert len(ranks.started) == 2
        assert [len(bucket) for bucket in ranks.started] == [first.numel(), second.numel()]
        exchange.finish(torch.zeros(3))
        assert len(ranks.started) == 2 + len(others) + 1


def test_gradients_go_while_backward_runs_and_only_in_the_last_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "CPU_BUCKET_BYTES", 1)  # each weight a bucket
    model, ranks = filled(small()), Listening()
    weights = list(model.parameters())
    seen: list[int] = []  # buckets started when the last gradient of a backward pass is being made
    weights[0].register_hook(lambda _: seen.append(len(ranks.started)))

    def batches(number: int) -> tuple[list[Batch], int]:
        ranks.started.clear()
        return [Batch(some_tokens(2, 32, seed=number), some_tokens(2, 32, seed=9)) for _ in "abc"], 6 * 32

    plan = TrainPlan(steps=2, batch_tokens=6 * 32, optim=OptimConfig())
    for _ in train(model, build_optimizer(model, plan.optim, "fp32"), batches, plan, ranks=ranks):
        assert len(ranks.started) == len(weights) + 1  # and the sum of the nats
    assert seen == [0, 0, len(weights) - 1] * 2


def test_a_rank_outside_its_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 2; in a world of 2 it must be from 0 to 1"):
        Ranks(2, 2)
