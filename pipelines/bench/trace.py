"""Traces of real services: when requests came, and how long prompts and replies were.

Two forms, plain or with gzip: Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens; Patel et al. 2024, Splitwise)
and Mooncake's JSON lines (timestamp in ms, input_length, output_length, hash_ids of the prompt's blocks of 512 tokens;
Qin et al. 2025). There is no text in them; a Mooncake trace says which prompts begin alike.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from pipelines.bench.asked import Asked

MOONCAKE_BLOCK = 512  # tokens
FITTING = 0.99  # share of the requests that are to fit the context whole; the others are cut


@dataclass(frozen=True)
class Fitted:
    """A trace's requests with lengths that a model can take."""

    asked: tuple[Asked, ...]
    scale: float  # of the lengths
    cut: int  # requests that were shortened further


def read_trace(path: Path, minutes: float | None = None) -> tuple[Asked, ...]:
    """Its requests by time, the first at 0; of the first `minutes` where given. ValueError names the line at fault."""
    found = []
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as data:
        file = io.TextIOWrapper(data, encoding="utf-8")
        try:
            for one in _requests(file):
                found.append(one)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: request {len(found) + 1} cannot be read ({error!r}); a trace is Azure's CSV with TIMESTAMP, "
                "ContextTokens and GeneratedTokens, or JSON lines with timestamp (ms), input_length and output_length"
            ) from error
    if not found:
        raise ValueError(f"{path} holds no request")
    found.sort(key=lambda one: one.at_s)
    first_s = found[0].at_s
    until_s = 60 * minutes if minutes is not None else float("inf")
    return tuple(replace(one, at_s=one.at_s - first_s) for one in found if one.at_s - first_s < until_s)


def fit(asked: Sequence[Asked], context: int, most_new: int, scale: float | None = None) -> Fitted:
    """Lengths times `scale`; without one, so that 99% of the requests fit into `context` with their replies.

    A request that still does not fit has its prompt cut, a reply over `most_new` is cut to that.
    """
    if scale is None:
        longest = sorted(one.prompt + one.new for one in asked)[min(len(asked) - 1, int(FITTING * len(asked)))]
        scale = min(1.0, (context - 2) / longest)  # 2: each length is rounded, up where it would be 0
    fitted, cut = [], 0
    for one in asked:
        new = max(1, round(one.new * scale))
        prompt = max(1, round(one.prompt * scale))
        kept = min(new, most_new, context - 1)
        room = min(prompt, context - kept)
        cut += (room, kept) != (prompt, new)
        block = max(1, round(one.block * scale)) if one.block else 0
        fitted.append(replace(one, prompt=room, new=kept, block=block))
    return Fitted(tuple(fitted), scale, cut)


def stretch(asked: Sequence[Asked], scale: float) -> tuple[Asked, ...]:
    """All times multiplied by `scale`: 2 is half the load."""
    return tuple(replace(one, at_s=one.at_s * scale) for one in asked)


def rate(asked: Sequence[Asked]) -> float:
    """Requests a second, from the first to the last."""
    return (len(asked) - 1) / asked[-1].at_s if len(asked) > 1 and asked[-1].at_s > 0 else 0.0


def _requests(file: Iterable[str]) -> Iterator[Asked]:
    lines = iter(file)
    first = next(lines, "")
    if first.lstrip().startswith("{"):
        for line in (first, *lines):
            if line.strip():
                yield _mooncake(json.loads(line))
        return
    names = next(csv.reader([first]), [])
    for row in csv.DictReader(lines, fieldnames=names):
        began = datetime.fromisoformat(row["TIMESTAMP"])
        since_s = (began - datetime.min.replace(tzinfo=began.tzinfo)).total_seconds()
        yield Asked(_length(row["ContextTokens"]), _length(row["GeneratedTokens"]), since_s)


def _mooncake(row: dict[str, object]) -> Asked:
    names = row.get("hash_ids", [])
    if not isinstance(names, list):
        raise TypeError(f"hash_ids is {names!r:.40}, not a list")
    blocks = tuple(int(name) for name in names)
    lengths = _length(row["input_length"]), _length(row["output_length"])
    return Asked(*lengths, float(str(row["timestamp"])) / 1000, blocks, MOONCAKE_BLOCK if blocks else 0)


def _length(value: object) -> int:
    tokens = int(str(value))
    if tokens < 0:
        raise ValueError(f"{tokens} tokens")
    return max(1, tokens)
