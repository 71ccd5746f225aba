"""YAML as plain data, with the line of every key. Knows nothing of pipelines.

Stricter than YAML 1.1: no anchors, aliases, tags or repeated keys; `no` and `2026-01-01` are words; 1e-3 is a number.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

Loc = tuple[str | int, ...]
Problem = tuple[Loc, str]  # where, and what is wrong there and how to mend it

MOST_DEEP = 30  # a pipeline file has five levels
TAG = "tag:yaml.org,2002:"
PLAIN = {
    "null": r"^(~|null|Null|NULL|)$",
    "bool": r"^(true|True|TRUE|false|False|FALSE)$",
    "int": r"^[-+]?[0-9][0-9_]*$",
    "float": r"^[-+]?(([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9_]+)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$",
}


class Words(yaml.SafeLoader):
    """Reads plain words as YAML 1.2 does, and 32_768 as a number besides."""

    yaml_implicit_resolvers = {  # noqa: RUF012  as the base class declares it
        None: [(TAG + name, re.compile(pattern)) for name, pattern in PLAIN.items()]
    }


@dataclass
class Document:
    """What a text says, where it says it, and what is wrong with the YAML itself."""

    data: Any = None
    lines: dict[Loc, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line(self, loc: Loc) -> int:
        """The line of `loc`, or of the nearest thing around it."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, 1)


def read_yaml(text: str) -> Document:
    """Never raises: what is wrong is in `problems`, and `data` is None when nothing could be read."""
    document = Document()
    try:
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=Words)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEEP:
                document.lines[("", number)] = _line(event.start_mark)
                document.problems.append((("", number), "not a pipeline file: nested too deeply"))
                break
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                document.lines[("", number)] = _line(event.start_mark)
                document.problems.append((("", number), "anchors are not used here; write the value out"))
        if not document.problems:
            node = yaml.compose(text, Loader=Words)
            document.data = None if node is None else _plain(document, node, ())
    except yaml.MarkedYAMLError as error:
        document.lines[("",)] = _line(error.problem_mark or error.context_mark)
        said = "; ".join(part for part in (error.context, error.problem) if part)
        document.problems.append((("",), f"not YAML: {said}"))
    except yaml.YAMLError as error:
        document.problems.append((("",), f"not YAML: {' '.join(str(error).split())}"))
    return document


def _line(mark: Any) -> int:
    """yaml counts from 0, and does not always know."""
    return mark.line + 1 if mark else 1


def _plain(document: Document, node: yaml.Node, loc: Loc) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
        data: dict[str, Any] = {}
        for key, value in node.value:
            line = _line(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                document.lines[(*loc, "?")] = line
                document.problems.append(((*loc, "?"), "a key must be a single word"))
                continue
            here = (*loc, key.value)
            if here in document.lines:
                again = (*loc, f"{key.value} ")  # a place of its own, so that both lines can be said
                document.lines[again] = line
                document.problems.append((again, f"given twice, first on line {document.lines[here]}; keep one"))
                continue
            document.lines[here] = line
            data[key.value] = _plain(document, value, here)
        return data
    if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
        items = []
        for number, item in enumerate(node.value):
            document.lines[(*loc, number)] = _line(item.start_mark)
            items.append(_plain(document, item, (*loc, number)))
        return items
    return _scalar(document, node, loc)


def _scalar(document: Document, node: yaml.Node, loc: Loc) -> Any:
    make = MAKE.get(node.tag.removeprefix(TAG))
    if make is None:
        document.problems.append((loc, f"the tag {node.tag} is not used here; write plain data"))
        return None
    try:
        return make(str(node.value).replace("_", "") if make in (int, _float) else str(node.value))
    except ValueError:  # Python refuses integers of thousands of digits
        document.problems.append((loc, f"not a number that can be used: {node.value[:40]}"))
        return 0


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


MAKE: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": _float,
    "str": str,
}
