"""Ranks that sum their gradients against one process that accumulates them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.nanochat.ranks import Case, run

pytestmark = pytest.mark.slow

CASES = [
    Case("one", world=1, rows=4, micro=2),
    Case("two", world=2, rows=4, micro=2),
    Case("four", world=4, rows=4, micro=2),
    Case("one-bf16", world=1, rows=4, micro=2, precision="bf16"),
    Case("two-bf16", world=2, rows=4, micro=2, precision="bf16"),
    Case("one-chat", world=1, rows=4, micro=4, chat=True),
    Case("three-chat", world=3, rows=4, micro=1, chat=True),
    Case("one-chat-few", world=1, rows=2, micro=2, chat=True),
    Case("three-chat-few", world=3, rows=2, micro=2, chat=True),  # rank 0 has no row
]

Result = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Case -> what each rank ended with."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, args=(CASES, folder), nprocs=4)
    return {
        case.name: [load_file(folder / f"{case.name}-{rank}.safetensors") for rank in range(case.world)]
        for case in CASES
    }


def assert_equal(a: Result, b: Result, but: str = "") -> None:
    differ = [name for name in a if name != but and not torch.equal(a[name], b[name])]
    assert not differ


def test_training_moves_the_weights(results: dict[str, list[Result]]) -> None:
    """Else the others would compare nothing."""
    assert results["one"][0]["model.layers.0.mlp.fc2.weight"].abs().max() > 1e-3
    assert results["one"][0]["losses"][0] != results["one"][0]["losses"][-1]


@pytest.mark.parametrize("precision", ["", "-bf16"])
def test_two_ranks_are_two_accumulation_steps_bit_for_bit(results: dict[str, list[Result]], precision: str) -> None:
    assert_equal(results[f"two{precision}"][0], results[f"one{precision}"][0])


def test_all_ranks_end_with_the_same_bits(results: dict[str, list[Result]]) -> None:
    for ranks in results.values():
        for other in ranks[1:]:
            assert_equal(ranks[0], other)


@pytest.mark.parametrize(
    ("many", "one"), [("four", "one"), ("three-chat", "one-chat"), ("three-chat-few", "one-chat-few")]
)
def test_other_worlds_differ_by_rounding_alone(results: dict[str, list[Result]], many: str, one: str) -> None:
    losses, expected = results[many][0]["losses"], results[one][0]["losses"]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
