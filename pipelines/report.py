"""What a pipeline made, as one self-contained HTML page and as JSON: curves, scores, answers, lineage, costs.

Reads manifests and the small files beside them; computes nothing again. Lies beside the runner in the layers: it knows
the plan and the store, and neither torch nor Ray.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.artifacts import Dir, Manifest, Store
from pipelines.load import Loaded
from pipelines.metrics import METRICS
from pipelines.plan import Step

ANSWERS_SHOWN = 12
INK, GRID = "#6b7280", "#9ca3af"  # readable on a light and on a dark page
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777")


@dataclass(frozen=True)
class Built:
    """A built step: its manifest and its files."""

    step: Step
    manifest: Manifest
    files: Dir


def report_json(steps: Sequence[Step], store: Store) -> dict[str, Any]:
    """`{"stages": {name: {"key", "metrics", "made", "inputs"}}}` of what is built."""
    return {
        "stages": {
            b.step.name: {
                "key": b.step.key,
                "metrics": b.manifest.metrics,
                "made": b.manifest.made,
                "inputs": b.manifest.inputs,
            }
            for b in _built(steps, store)
        }
    }


def write_report(loaded: Loaded, steps: Sequence[Step], store: Store, out: Path) -> Path:
    """Writes the page to `out` and returns it. Stages that are not built are shown as such."""
    built = {b.step.name: b for b in _built(steps, store)}
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        page.render(
            name=loaded.pipeline.name,
            profile=loaded.profile_name,
            steps=steps,
            built=built,
            units={m.name: m for m in METRICS},
            scores=[b for b in built.values() if b.step.spec.makes == "report"],
            curves=_curves(built),
            answers=_answers(built),
            recipe=lambda b: json.dumps(b.manifest.recipe, indent=1, sort_keys=True),
            number=_number,
        ),
        encoding="utf-8",
    )
    return out


def curves(built: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss over tokens, smoothed and raw, of each training. built: stage -> rows of its steps.jsonl."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    for axes, colour, (name, rows) in zip(
        figure.subplots(1, len(built), squeeze=False)[0], COLOURS, built.items(), strict=False
    ):
        tokens = [row["tokens"] / 1e6 for row in rows]
        losses = [row["loss"] for row in rows]
        axes.plot(tokens, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(tokens, _smooth(losses), color=colour, linewidth=1.6)
        _dress(axes, title=name, x="million tokens", y="loss, nats per token")
    return figure


def _built(steps: Sequence[Step], store: Store) -> list[Built]:
    found = []
    for step in steps:
        if store.state(step.address) == "built":
            manifest = store.read(step.address)
            found.append(Built(step, manifest, store.dir(step.address, manifest.data)))
    return found


def _rows(files: Dir, name: str) -> list[dict[str, Any]]:
    with files.open(name) as lines:
        return [json.loads(line) for line in lines]


def _curves(built: dict[str, Built]) -> str | None:
    """The curves of all trainings as SVG, or None where nothing was trained."""
    trained = {
        name: _rows(b.files, "steps.jsonl")
        for name, b in built.items()
        if any(f.path == "steps.jsonl" for f in b.manifest.files)
    }
    if not trained:
        return None
    text = io.StringIO()
    curves(trained).savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _answers(built: dict[str, Built]) -> list[dict[str, Any]]:
    """A few held-out questions with what was wanted and what the model said."""
    for b in built.values():
        if any(f.path == "answers.jsonl" for f in b.manifest.files):
            rows = _rows(b.files, "answers.jsonl")
            return rows[:: max(1, len(rows) // ANSWERS_SHOWN)][:ANSWERS_SHOWN]
    return []


def _smooth(values: list[float], span: float = 0.9) -> list[float]:
    """Exponential moving average, begun at the first value."""
    smooth, last = [], values[0]
    for value in values:
        last = span * last + (1 - span) * value
        smooth.append(last)
    return smooth


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.patch.set_alpha(0)
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=GRID, alpha=0.25, linewidth=0.6)
    for side in axes.spines.values():
        side.set_color(GRID)
        side.set_alpha(0.4)


def _number(value: float) -> str:
    """For people: 3,276,800 and 1.482."""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"
