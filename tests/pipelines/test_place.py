"""How many workers a stage may have, as the file says it."""

import pytest
from pydantic import ValidationError

from pipelines.spec import Place


def test_workers_are_a_number_or_the_fewest_and_the_most() -> None:
    assert Place().most_workers == 1
    assert Place(workers=3).most_workers == 3
    elastic = Place.model_validate({"workers": [2, 8], "retries": 1})
    assert elastic.most_workers == 8
    assert Place.model_validate_json(elastic.model_dump_json()) == elastic


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"workers": 0}, "must be greater than 0, but it is 0"),
        ({"workers": [0, 2], "retries": 1}, "must be greater than 0, but it is 0"),
        ({"workers": [4, 2], "retries": 1}, r"is \[4, 2\], but the fewest come first; write \[2, 4\]"),
        ({"workers": [1, 2]}, "retries is 0, .* give `retries` the number of losses to survive"),
        ({"workers": [1, 2, 3], "retries": 1}, "workers"),
        ({"parallel": "zero2"}, "'ddp' or 'zero1'"),
    ],
)
def test_a_wrong_place_is_refused_with_a_remedy(place: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Place.model_validate(place)
