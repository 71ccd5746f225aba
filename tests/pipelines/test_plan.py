"""Keys. Write tests/data/keys.json anew with:  python -m tests.pipelines.test_plan"""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipelines.load import SpecError, load
from pipelines.plan import Step, changes, plan
from pipelines.spec import Pretrain
from tests.pipelines.fakes import FILE, edited

KEYS = Path(__file__).parents[1] / "data" / "keys.json"
PROFILES = ("laptop", "h200x1", "h100x8", "h100x16")


def keys(path: Path = FILE, profile: str = "laptop", sets: tuple[str, ...] = ()) -> dict[str, str]:
    return {s.name: s.key for s in plan(load(path, profile, sets))}


def all_keys() -> dict[str, dict[str, str]]:
    return {profile: keys(profile=profile) for profile in PROFILES}


def test_the_keys_of_the_shipped_file_are_those_that_were_pinned() -> None:
    """A key that moves makes every user's artifacts useless: raise `version`, or put the new setting into `later`."""
    assert all_keys() == json.loads(KEYS.read_text()), "if that is meant: python -m tests.pipelines.test_plan"


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_built_on_comes_first(profile: str) -> None:
    steps = plan(load(FILE, profile))
    for number, step in enumerate(steps):
        assert set(step.inputs.values()) <= {s.name for s in steps[:number]}
        assert len(step.key) == 16
        assert step.address == f"{step.spec.makes}/{step.name}-{step.key}"


def test_only_takes_a_stage_and_what_it_builds_on() -> None:
    assert [s.name for s in plan(load(FILE, "laptop"), "base")] == ["vocabulary", "corpus", "base"]
    with pytest.raises(SpecError, match="--only: no stage 'bsae'; did you mean 'base'"):
        plan(load(FILE, "laptop"), "bsae")


def test_where_a_stage_runs_is_not_in_its_key() -> None:
    assert keys(profile="h100x8") == keys(profile="h100x16") == keys(profile="h200x1")
    more = ("place.base.workers=4", "place.base.micro_batch=2", "store=/elsewhere", "serve.max_batch=2")
    assert keys(sets=more) == keys()


@pytest.mark.parametrize(
    ("setting", "moved"),
    [
        (
            "vocabulary.size=5000",
            {"vocabulary", "corpus", "dialogues", "base", "chat", "base_report", "chat_report", "bundle"},
        ),
        ("corpus.holdout=0.03", {"corpus", "base", "chat", "base_report", "chat_report", "bundle"}),
        ("dialogues.revision=2", {"dialogues", "chat", "chat_report", "bundle"}),
        ("base.optim.matrix_lr=0.03", {"base", "chat", "base_report", "chat_report", "bundle"}),
        ("chat.epochs=2", {"chat", "chat_report", "bundle"}),
        ("bundle.dtype=fp32", {"bundle"}),
        ("base.optim.matrix_lr=2e-2", set()),
        ("base.tokens=2400000.0", set()),
    ],
)
def test_a_setting_moves_the_keys_of_its_stage_and_of_what_follows(setting: str, moved: set[str]) -> None:
    before, after = keys(), keys(sets=(setting,))
    assert {name for name in before if before[name] != after[name]} == moved


def test_the_seed_moves_only_what_draws_and_what_follows(tmp_path: Path) -> None:
    before, after = keys(), keys(edited(tmp_path, ("seed: 1337 ", "seed: 1338 ")))
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {"base", "chat", "base_report", "chat_report", "bundle"}
    recipes = {s.name: s.recipe for s in plan(load(FILE, "laptop"))}
    assert {name for name, recipe in recipes.items() if "seed" in recipe} == {"base", "chat"}


def named(sets: tuple[str, ...], name: str) -> list[str]:
    def of(which: tuple[str, ...]) -> Step:
        return next(s for s in plan(load(FILE, "laptop", which)) if s.name == name)

    return changes(of(()).recipe, of(sets).recipe, of(sets).inputs)


def test_a_change_is_named() -> None:
    assert named(("base.optim.matrix_lr=3e-2", "base.tokens=4_000_000"), "base") == [
        "optim.matrix_lr 0.02 -> 0.03",
        "tokens 2400000 -> 4000000",
    ]
    assert named(("corpus.revision=2",), "corpus") == ["revision unset -> 2"]
    assert named(("dialogues.holdout=0.01", "chat.epochs=3"), "chat") == ["input dialogues", "epochs 1.2 -> 3.0"]
    assert named((), "base") == []


def test_a_new_version_and_a_new_seed_are_named() -> None:
    old: dict[str, Any] = {"version": 1, "seed": 1, "inputs": {}, "settings": {"a": 1}}
    assert changes(old, old | {"version": 2, "seed": 3}, {}) == ["version 1 -> 2", "seed 1 -> 3"]


def test_a_setting_added_later_keeps_old_keys_at_its_neutral_value(monkeypatch: pytest.MonkeyPatch) -> None:
    class Before(Pretrain):
        """As it was when there was no `clip`."""

        later: ClassVar[dict[str, object]] = {"optim.clip": 1.0}

    with_it = keys()
    monkeypatch.setattr(Pretrain, "later", Before.later)
    without, moved = keys(), keys(sets=("base.optim.clip=0.5",))
    recipe = next(s for s in plan(load(FILE, "laptop")) if s.name == "base").recipe
    assert "clip" not in recipe["settings"]["optim"]
    assert without["base"] != with_it["base"]  # it is the recipe that no longer holds it
    assert len({without["base"], moved["base"]}) == 2
    assert without["corpus"] == with_it["corpus"]


if __name__ == "__main__":
    KEYS.parent.mkdir(exist_ok=True)
    KEYS.write_text(json.dumps(all_keys(), indent=1) + "\n")
