"""Reads a pipeline file, lays a profile over it, and says everything that is wrong at once.

Each problem is one line: where (file and line, or --set), the dotted path, what is wrong and how to mend it.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipelines.references import check_references, closest, mapping
from pipelines.spec import Pipeline, Profile, stage_classes
from pipelines.yamlfile import Document, Loc, Problem, read_yaml

BLANK = "YOUR-"  # stands in a shipped file where only the user knows what to write
SET = "--set"


class SpecError(ValueError):
    """A pipeline file, or a --set, that cannot be run. The message lists every problem."""


@dataclass(frozen=True)
class Loaded:
    """A checked pipeline under one profile."""

    pipeline: Pipeline
    profile: Profile
    profile_name: str
    path: Path
    # Places that still say YOUR-, one message each. They do not stop `plan`, which must work on the shipped file
    # without any account; `filled` is what run, serve, report and gc ask for.
    blanks: tuple[str, ...] = ()

    @property
    def base(self) -> Path:
        """Where relative paths of the file begin."""
        return self.path.parent.absolute()

    def filled(self) -> "Loaded":
        """Itself. Raises SpecError while a value that only the user knows is not written."""
        if self.blanks:
            raise SpecError("\n".join(self.blanks))
        return self


@dataclass
class _Laid:
    """The file's data with one profile's `set` laid over it."""

    data: dict[str, Any]
    origin: dict[Loc, Loc]  # where a laid value goes -> where it was written
    problems: list[Problem]


def load(path: Path, profile: str, sets: Sequence[str] = ()) -> Loaded:
    """Reads `path` and lays the profile named `profile`, then `sets` (`base.tokens=1_000_000`), over it.

    Raises SpecError: the message names every problem of the file, under each of its profiles.
    """
    document = _read(path)
    if not isinstance(document.data, dict):
        if not document.problems:
            document.problems.append(((), "not a pipeline file: it must have name, stages and profiles"))
        raise SpecError(_say(path, document, document.problems))
    problems = list(document.problems)
    profiles = mapping(document.data.get("profiles"))
    if profile not in profiles:
        near = closest(profile, profiles) or f"; there are {', '.join(profiles) or 'none'}"
        problems.append((("profiles",), f"no profile {profile!r}{near}"))
    chosen = None
    for name in sorted(profiles, key=lambda p: p != profile) or [profile]:
        laid = _lay(document.data, name, sets if name == profile else ())
        problems += laid.problems
        pipeline = _validate(laid, problems)
        if name == profile and pipeline is not None:
            chosen = pipeline, laid
    if problems or chosen is None:
        raise SpecError(_say(path, document, problems))
    pipeline, laid = chosen
    blanks = [(_origin(laid, loc), text) for loc, text in _blanks(laid.data, profile)]
    said = tuple(_say(path, document, [blank]) for blank in blanks)
    return Loaded(pipeline, pipeline.profiles[profile], profile, path, said)


def _read(path: Path) -> Document:
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; give the path of a pipeline file") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text (byte {error.start}); is it a pipeline file?") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None


def _lay(data: dict[str, Any], profile: str, sets: Sequence[str]) -> _Laid:
    laid = _Laid(copy.deepcopy(data), {}, [])
    for dotted, value in mapping(mapping(mapping(data.get("profiles")).get(profile)).get("set")).items():
        _put_setting(laid, dotted.split("."), value, ("profiles", profile, "set", dotted))
    for text in sets:
        dotted, equals, value_text = text.partition("=")
        origin: Loc = (SET, dotted)
        value = read_yaml(value_text)
        if not equals:
            laid.problems.append((origin, "has no value; write it as PATH=VALUE, for instance base.tokens=1_000_000"))
        elif value.problems:
            laid.problems += [(origin, said) for _, said in value.problems]
        elif dotted == "store" or dotted.startswith(("serve.", "place.")):
            _put_place(laid, profile, dotted, value.data, origin)
        else:
            _put_setting(laid, dotted.split("."), value.data, origin)
    return laid


def _put_setting(laid: _Laid, path: list[str], value: Any, origin: Loc) -> None:
    """stage.field.field"""
    stages = mapping(laid.data.get("stages"))
    stage, *rest = path
    if stage not in stages:
        laid.problems.append((origin, f"no stage {stage!r}{closest(stage, stages)}"))
    elif not rest:
        laid.problems.append((origin, f"names a whole stage; name a setting of it, for instance {stage}.kind"))
    else:
        _put(laid, ("stages", *path), value, origin)


def _put_place(laid: _Laid, profile: str, dotted: str, value: Any, origin: Loc) -> None:
    """store, serve.FIELD or place.STAGE.FIELD of the profile."""
    words = dotted.split(".")
    if words[0] == "place":
        if len(words) < 3:
            laid.problems.append((origin, "name a stage and a field, for instance place.default.workers"))
            return
        places = mapping(mapping(mapping(laid.data.get("profiles")).get(profile)).get("place"))
        if places and words[1] not in places and "default" in places:
            places[words[1]] = copy.deepcopy(places["default"])  # change one field of where it runs, not all
    _put(laid, ("profiles", profile, *words), value, origin)


def _put(laid: _Laid, path: Loc, value: Any, origin: Loc) -> None:
    data: Any = laid.data
    for number, part in enumerate(path):
        if not isinstance(data, dict):
            at = ".".join(map(str, path[:number]))
            laid.problems.append((origin, f"{at} is no mapping, so it has no {part!r}"))
            return
        if number < len(path) - 1:
            if data.get(part) is None:
                data[part] = {}
            data = data[part]
    data[path[-1]] = value
    laid.origin[path] = origin


def _origin(laid: _Laid, loc: Loc) -> Loc:
    """Where the user wrote what stands at `loc`."""
    for length in range(len(loc), 0, -1):
        if loc[:length] in laid.origin:
            return laid.origin[loc[:length]] + loc[length:]
    return loc


def _validate(laid: _Laid, problems: list[Problem]) -> Pipeline | None:
    """The pipeline, or None with what is wrong added to `problems`; nothing is said twice."""
    pipeline, found = None, check_references(laid.data)
    try:
        pipeline = Pipeline.model_validate(laid.data)
    except ValidationError as error:
        found = [*_explain(error, laid.data), *found]
    known = {loc for loc, _ in found}
    found += [problem for problem in _quoted(laid.data, (), laid.data) if problem[0] not in known]
    for loc, text in found:
        problem = (_origin(laid, loc), text)
        if problem not in problems:
            problems.append(problem)
    return pipeline


def _explain(errors: ValidationError, data: Any) -> Iterator[Problem]:
    """pydantic's errors in our words; those of the members of a union are said as one."""
    by_loc: dict[Loc, list[str]] = {}
    for error in errors.errors(include_url=False):
        loc = _real(tuple(error["loc"]), data)
        kind, given = error["type"], error.get("input")
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            near = closest(loc[-1], _fields(_type_at(loc[:-1], data)))
            text = f"unknown key {str(loc[-1])!r}{near or '; take it out'}"
        elif kind == "missing":
            text = "is missing; write it"
        elif kind in ("union_tag_invalid", "union_tag_not_found") or (len(loc) == 2 and loc[0] == "stages"):
            loc, text = _kind_problem(loc, given, error)
        else:
            said = error["msg"].removeprefix("Value error, ")
            said = said.replace("Input should be", "must be").replace("Input should", "must")
            text = said if kind == "value_error" else f"{said[0].lower()}{said[1:]}, but it is {_short(given)}"
        by_loc.setdefault(loc, []).append(text)
    for loc, texts in by_loc.items():
        yield loc, "; or ".join(dict.fromkeys(texts))


def _kind_problem(loc: Loc, given: Any, error: Any) -> tuple[Loc, str]:
    kinds = list(stage_classes())
    if error["type"] == "string_pattern_mismatch":
        return loc, "a stage's name is lower-case letters, digits and _, and begins with a letter"
    if not isinstance(given, dict):
        return loc, f"a stage is a mapping with a `kind` (one of {', '.join(kinds)}), but it is {_short(given)}"
    if "kind" not in given:
        return (*loc, "kind"), f"is missing; write one of {', '.join(kinds)}"
    if error["type"] == "union_tag_invalid":
        near = closest(given["kind"], kinds)
        return (*loc, "kind"), f"unknown kind {given['kind']!r}{near or f'; kinds are {chr(44).join(kinds)}'}"
    return loc, error["msg"].removeprefix("Value error, ")


def _real(loc: Loc, data: Any) -> Loc:
    """pydantic's location without the names of union members that it puts between."""
    if loc[:1] == ("stages",) and len(loc) > 2:
        tag = loc[2]
        loc = loc[:2] if tag == "[key]" else (*loc[:2], *loc[3:])
    real: list[str | int] = []
    for number, part in enumerate(loc):
        inside = isinstance(data, dict) and part in data
        if inside or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            data = data[part]
            real.append(part)
        elif number == len(loc) - 1 and isinstance(data, dict):
            real.append(part)  # what is missing
    return tuple(real)


def _type_at(loc: Loc, data: Any) -> Any:
    """The type that spec.py gives to a place, or None where it has none."""
    here: Any = Pipeline
    for number, part in enumerate(loc):
        if loc[:1] == ("stages",) and number == 1:
            here = stage_classes().get(str(mapping(data["stages"].get(part)).get("kind")))
        elif (isinstance(here, type) and issubclass(here, BaseModel)) or is_dataclass(here):
            here = _fields(here).get(str(part))
        else:
            here = get_args(here)[-1] if get_args(here) else None
        while len(options := [a for a in get_args(here) if a is not type(None)]) == 1:
            here = options[0]  # X | None
    return here


def _fields(here: Any) -> dict[str, Any]:
    """The names and types of the keys of a class of spec.py or nanochat/config.py; nothing for another type."""
    if isinstance(here, type) and issubclass(here, BaseModel):
        return {name: info.annotation for name, info in here.model_fields.items()}
    return {f.name: f.type for f in fields(here)} if is_dataclass(here) else {}


def _quoted(value: Any, loc: Loc, data: Any) -> Iterator[Problem]:
    """Words and booleans where a number belongs, which pydantic would quietly turn into one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if loc[:1] != ("profiles",) or loc[2:] != ("set",):
                yield from _quoted(inner, (*loc, key), data)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _quoted(inner, (*loc, number), data)
    elif isinstance(value, (str, bool)):
        here = _type_at(loc, data)
        if {int, float} & {here, *get_args(here)} and str not in {here, *get_args(here)}:
            yield loc, f"must be a number, but it is {_short(value)}; write it plainly, without quotes"


def _blanks(data: dict[str, Any], profile: str) -> Iterator[Problem]:
    """Strings of the chosen profile, and of the stages under it, in which a person has yet to write something."""

    def walk(value: Any, loc: Loc) -> Iterator[Problem]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, (*loc, key))
        elif isinstance(value, str) and BLANK in value:
            field = ".".join(map(str, loc[2:] if loc[0] == "profiles" else loc[1:]))
            yield loc, f"still says {value!r}; write your own there, or give --set {field}=VALUE"

    for part in ("store", "cluster"):
        yield from walk(data["profiles"][profile].get(part), ("profiles", profile, part))
    yield from walk(data["stages"], ("stages",))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _say(path: Path, document: Document, problems: Sequence[Problem]) -> str:
    def place(loc: Loc) -> tuple[int, str]:
        dots = ".".join(str(part).strip() for part in loc if part != "" and isinstance(part, (str, int)))
        if loc[:1] == (SET,):
            return 1 << 30, f"{SET}: {dots.removeprefix(f'{SET}.')}"
        line = document.line(loc)
        return line, f"{path}:{line}{f': {dots}' if dots and loc[0] != '' else ''}"

    said = sorted(((*place(loc), text) for loc, text in problems), key=lambda p: p[0])
    return "\n".join(f"{where}: {text}" for _, where, text in said)
