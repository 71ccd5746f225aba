"""What stages say about each other: names, what is made and needed, circles, one vocabulary. Works on half-right files.

Everything here looks at plain data, so that wrong references are reported together with wrong settings.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from pipelines.spec import RESERVED, Needs, Service, needed_fields, stage_classes
from pipelines.yamlfile import Loc, Problem


def closest(word: object, words: Any) -> str:
    """`; did you mean 'base'?` where something near exists, else nothing."""
    near = get_close_matches(str(word), [str(w) for w in words], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_references(data: dict[str, Any]) -> list[Problem]:
    """Every wrong name in `data`, a pipeline file as plain data in which anything else may be wrong too."""
    stages = mapping(data.get("stages"))
    problems: list[Problem] = [
        (("stages", name), f"{name!r} means something else in `place` and `--set`; choose another name")
        for name in stages
        if name in RESERVED
    ]
    wrong = list(_wrong_names(data, stages))
    problems += wrong or [*_circles(stages)]
    if not problems:
        problems += _two_vocabularies(stages)
    for profile, settings in mapping(data.get("profiles")).items():
        for name in mapping(mapping(settings).get("place")):
            if name not in {*stages, "default"}:
                text = f"no stage {name!r}{closest(name, [*stages, 'default'])}"
                problems.append((("profiles", profile, "place", name), text))
    return problems


def mapping(value: object) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def _users(data: dict[str, Any], stages: dict[str, Any]) -> Iterator[tuple[Loc, dict[str, Any], dict[str, Needs]]]:
    classes = stage_classes()
    for name, spec in stages.items():
        kind = classes.get(str(mapping(spec).get("kind")))
        if kind is not None:
            yield ("stages", name), mapping(spec), needed_fields(kind)
    yield ("service",), mapping(data.get("service")), needed_fields(Service)


def _wrong_names(data: dict[str, Any], stages: dict[str, Any]) -> Iterator[Problem]:
    classes = stage_classes()
    makes = {
        name: classes[str(mapping(spec).get("kind"))].makes if str(mapping(spec).get("kind")) in classes else None
        for name, spec in stages.items()
    }
    for loc, spec, fields in _users(data, stages):
        for field, needs in fields.items():
            named = spec.get(field)
            if not isinstance(named, str):
                continue  # missing or of a wrong type: spec.py says so
            able = [n for n, made in makes.items() if made == needs.kind and n != loc[-1]]
            offered = f"stages that make one: {', '.join(able) or 'none'}"
            if named not in stages:
                yield (*loc, field), f"no stage {named!r}{closest(named, able) or f'; {offered}'}"
            elif makes[named] is not None and makes[named] != needs.kind:
                yield (*loc, field), f"{named!r} makes {makes[named]}, but {needs.kind} is needed here; {offered}"
            elif needs.format and stages[named].get("format") in {"text", "chat"} - {needs.format}:
                fit = [n for n in able if stages[n].get("format") == needs.format]
                yield (
                    (*loc, field),
                    f"{named!r} holds shards of format {stages[named]['format']}, but {needs.format} is needed here; "
                    f"stages that make it: {', '.join(fit) or 'none'}",
                )


def _edges(stages: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """stage -> (field, stage that it names)."""
    return {
        str(loc[-1]): [(f, spec[f]) for f in fields if isinstance(spec.get(f), str) and spec[f] in stages]
        for loc, spec, fields in _users({}, stages)
        if loc[0] == "stages"
    }


def _circles(stages: dict[str, Any]) -> Iterator[Problem]:
    edges, finished = _edges(stages), set[str]()
    for start in edges:
        path: list[str] = []

        def visit(name: str, path: list[str] = path) -> Iterator[Problem]:
            if name in finished:
                return
            path.append(name)
            for field, needed in edges.get(name, []):
                if needed in path:
                    circle = " -> ".join([*path[path.index(needed) :], needed])
                    yield ("stages", name, field), f"stages build on each other in a circle: {circle}; break it here"
                else:
                    yield from visit(needed)
            path.pop()
            finished.add(name)

        yield from visit(start)


def _two_vocabularies(stages: dict[str, Any]) -> Iterator[Problem]:
    edges, known = _edges(stages), dict[str, set[str]]()

    def vocabularies(name: str) -> set[str]:
        if name not in known:
            if stages[name].get("kind") == "tokenizer":
                known[name] = {name}
            else:
                known[name] = {v for _, needed in edges.get(name, []) for v in vocabularies(needed)}
        return known[name]

    for name, needs in edges.items():
        if len(vocabularies(name)) > 1 and all(len(vocabularies(needed)) == 1 for _, needed in needs):
            said = ", ".join(f"{needed} with {next(iter(vocabularies(needed)))}" for _, needed in needs)
            yield ("stages", name), f"its inputs have different vocabularies ({said}); let them name the same tokenizer"
