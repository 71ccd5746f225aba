"""Where a stage runs, as the file says it: how many workers, and how they talk."""

import pytest
from pydantic import ValidationError

from pipelines.spec import Place
from pipelines.stages._fit import _environment


def test_workers_are_a_number_or_the_fewest_and_the_most() -> None:
    assert Place().most_workers == 1
    assert Place(workers=3).most_workers == 3
    elastic = Place.model_validate({"workers": [2, 8], "retries": 1})
    assert elastic.most_workers == 8
    assert Place.model_validate_json(elastic.model_dump_json()) == elastic


@pytest.mark.parametrize(
    ("nccl", "told"),
    [
        (None, {}),
        ({}, {}),
        ({"algorithm": "nvls"}, {"env_vars": {"NCCL_ALGO": "NVLS"}}),
        (
            {"algorithm": "ring", "interface": "^lo,docker"},
            {"env_vars": {"NCCL_ALGO": "Ring", "NCCL_SOCKET_IFNAME": "^lo,docker"}},
        ),
    ],
)
def test_workers_are_told_what_nccl_reads(nccl: object, told: dict[str, object]) -> None:
    assert _environment(Place.model_validate({"gpu": "H100", "nccl": nccl})) == told


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"workers": 0}, "must be greater than 0, but it is 0"),
        ({"workers": [0, 2], "retries": 1}, "must be greater than 0, but it is 0"),
        ({"workers": [4, 2], "retries": 1}, r"is \[4, 2\], but the fewest come first; write \[2, 4\]"),
        ({"workers": [1, 2]}, "retries is 0, .* give `retries` the number of losses to survive"),
        ({"workers": [1, 2, 3], "retries": 1}, "workers"),
        ({"parallel": "zero2"}, "'ddp' or 'zero1'"),
        ({"nccl": {"algorithm": "star"}, "gpu": "H100"}, "'ring', 'tree' or 'nvls'"),
        ({"nccl": {"interface": "eth0"}}, "nccl is how GPUs exchange gradients, but there is no `gpu` here"),
    ],
)
def test_a_wrong_place_is_refused_with_a_remedy(place: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Place.model_validate(place)
