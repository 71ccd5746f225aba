"""A load as a picture: what each request waited over time, and how the waits are spread."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.bench.outcome import Floats, Outcome


def draw(title: str, sides: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """sides: by name, what was measured first and what it is compared with. The suffix of `path` says the format."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with mpl.rc_context({"svg.hashsalt": "nanochat"}):  # the same numbers give the same file
        figure, (over, spread) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        first = next(iter(sides.values()))
        begins = np.cumsum([0.0, *(outcome.wall_s for outcome in first)])
        good = [(reply, begin) for o, begin in zip(first, begins, strict=False) for reply in o.good]
        due = [reply.due_s + begin for reply, begin in good]
        for number, (label, waits) in enumerate(_waits(first).items()):
            if len(waits) == len(due):
                over.plot(due, 1e3 * waits, ".", color=f"C{number}", markersize=3, label=label)
        bad = [r.due_s + begin for o, begin in zip(first, begins, strict=False) for r in o.replies if r.wrong]
        if bad:
            over.plot(bad, np.ones(len(bad)), "x", color="C3", markersize=4, label="errors")
        over.set(yscale="log", xlabel="seconds; when a request was due", ylabel="milliseconds")
        for line, (name, outcomes) in zip(("-", "--"), sides.items(), strict=False):
            for number, (label, waits) in enumerate(_waits(outcomes).items()):
                if len(waits):
                    shares = np.arange(1, len(waits) + 1) / len(waits)
                    told = label if len(sides) == 1 else f"{label}, {name}"
                    spread.plot(1e3 * np.sort(waits), shares, line, color=f"C{number}", label=told)
        spread.set(xscale="log", xlabel="milliseconds", ylabel="share of them that is shorter", ylim=(0, 1))
        for axis in (over, spread):
            axis.grid(True, which="major", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small", framealpha=0.8, edgecolor="none")
        for numbers in (over.yaxis, spread.xaxis):
            numbers.set_major_locator(LogLocator(subs=(1, 3)))
            numbers.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            numbers.set_minor_formatter(NullFormatter())
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _waits(outcomes: Sequence[Outcome]) -> dict[str, Floats]:
    good = [(reply, outcome.until_s) for outcome in outcomes for reply in outcome.good]
    gaps = [reply.between_s(until_s) for reply, until_s in good]
    return {
        "time to first token": np.array([reply.ttft_s for reply, _ in good]),
        "latency": np.array([reply.end_s - reply.due_s for reply, _ in good]),
        "between tokens": np.concatenate(gaps) if gaps else np.empty(0),
    }
