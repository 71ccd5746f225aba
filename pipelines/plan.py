"""Turns a checked pipeline into an ordered list of steps, each with the key of what it makes.

A key is known before anything runs: it is a hash of the stage's settings, its version, the keys of what it builds on,
and the seed where the stage draws. Where and how a stage runs is not in it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.load import Loaded, SpecError
from pipelines.references import closest
from pipelines.spec import Place, StageSpec, needs_of


@dataclass(frozen=True)
class Step:
    """One stage, ready to run: its settings, its key, and where it goes."""

    name: str
    spec: StageSpec
    key: str  # 16 hex digits
    inputs: dict[str, str]  # field -> name of the step it builds on
    place: Place
    recipe: dict[str, Any]  # what the key is a hash of; kept in the manifest so that a change can be named

    @property
    def kind(self) -> str:
        """The stage's kind, as in the file."""
        return str(self.recipe["settings"]["kind"])

    @property
    def address(self) -> str:
        """Where the artifact lies under the store."""
        return f"{self.spec.makes}/{self.name}-{self.key}"


def plan(loaded: Loaded, only: str | None = None) -> list[Step]:
    """Every step in an order that can be run; with `only`, that stage and what it builds on.

    Raises SpecError if `only` is not a stage.
    """
    stages = loaded.pipeline.stages
    if only is not None and only not in stages:
        raise SpecError(f"--only: no stage {only!r}{closest(only, stages)}; there are {', '.join(stages)}")
    done: dict[str, Step] = {}

    def visit(name: str) -> None:
        if name not in done:
            inputs = {field: needed for field, (needed, _) in needs_of(stages[name]).items()}
            for needed in inputs.values():  # no circle: load refuses it
                visit(needed)
            done[name] = _step(loaded, name, inputs, done)

    for name in [only] if only else stages:
        visit(name)
    return list(done.values())


def _step(loaded: Loaded, name: str, inputs: dict[str, str], done: dict[str, Step]) -> Step:
    spec = loaded.pipeline.stages[name]
    settings = spec.model_dump(mode="json", exclude=set(inputs))
    for path, neutral in spec.later.items():
        _drop(settings, path.split("."), neutral)
    recipe: dict[str, Any] = {
        "version": spec.version,
        "settings": settings,
        "inputs": {field: done[needed].key for field, needed in inputs.items()},
    }
    if spec.draws:
        recipe["seed"] = loaded.pipeline.seed
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    places = loaded.profile.place
    place = places.get(name) or places.get("default") or Place()
    return Step(name, spec, hashlib.sha256(text.encode()).hexdigest()[:16], inputs, place, recipe)


def _drop(settings: dict[str, Any], path: list[str], neutral: object) -> None:
    """Leaves out a setting added later while it has its neutral value, so that old keys still hold."""
    *above, last = path
    for part in above:
        settings = settings[part]
    if settings[last] == neutral:
        del settings[last]


def changes(old: dict[str, Any], new: dict[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """What differs between two recipes: settings as `optim.matrix_lr 0.02 -> 0.03`, inputs by the stage they name.

    inputs: field -> stage, of the newer recipe.
    """
    said = [f"input {inputs.get(f, f)}" for f, key in new["inputs"].items() if old["inputs"].get(f) != key]
    for part in ("version", "seed"):
        if old.get(part) != new.get(part):
            said.append(f"{part} {_show(old.get(part))} -> {_show(new.get(part))}")
    return said + _differences(old["settings"], new["settings"])


def _differences(old: dict[str, Any], new: dict[str, Any], at: str = "") -> list[str]:
    said: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            said += _differences(a, b, f"{at}{key}.")
        elif a != b:
            said.append(f"{at}{key} {_show(a)} -> {_show(b)}")
    return said


def _show(value: object) -> str:
    return "unset" if value is None else str(value)
