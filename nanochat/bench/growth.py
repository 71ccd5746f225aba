"""Time per token with and without a cache, over the length of the text; and a picture of it.

Without one, a token costs what the whole text costs: the time to the first token of a prompt that long. That is kind
to the loop without a cache, since our prefill computes the last position's logits only.

    python -m nanochat.bench.growth LINES PNG       draws what `nanochat bench decode --lengths ... --json` printed
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat.bench.measure import Measurement, measurement
from nanochat.bench.ours import Ours
from nanochat.bench.setup import Load, Run, setup_of
from nanochat.bench.worker import Worker, in_turn


def measure(args: argparse.Namespace) -> Iterator[Measurement]:
    """A row for each precision and length, shortest first."""
    for precision in args.precision:
        with Worker(Ours, setup_of(args, precision, max(args.lengths), args.new)) as worker:
            for length in sorted(args.lengths):
                runs = _runs(worker, Load(1, length, args.new), args.runs)
                cached = [run.rate for run in runs]
                without = [1 / run.first_s[0] for run in runs]
                more = {
                    "precision": precision,
                    "text_tokens": length,
                    "new_tokens": args.new,
                    "time_per_token_s": 1 / statistics.median(cached),
                    "uncached_time_per_token_s": 1 / statistics.median(without),
                    **worker.ask("told"),
                }
                case = f"depth {args.config.depth}, {precision}, after {length} tokens"
                yield measurement("decode", case, cached, args, more).against("no cache", without)


def _runs(worker: Worker, load: Load, runs: int) -> list[Run]:
    def run(worker: Worker, number: int) -> Run:
        done: Run = worker.ask("decode", Load(load.batch, load.prompt, load.new, seed=number))
        return done

    [found] = in_turn([worker], run, runs + 1)
    return found[1:]  # the first is the warm-up


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The rows of `measure`, as they are printed, as one picture; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, precision in enumerate(dict.fromkeys(row["precision"] for row in rows)):
        mine = [row for row in rows if row["precision"] == precision]
        lengths = [row["text_tokens"] for row in mine]
        for name, key, line in (("no cache", "uncached_time_per_token_s", "o--"), ("cache", "time_per_token_s", "o-")):
            times = [1000 * row[key] for row in mine]
            axis.plot(lengths, times, line, color=f"C{number}", markersize=4, label=f"{name}, {precision}")
    axis.set(xscale="log", yscale="log", xlabel="tokens of text so far", ylabel="milliseconds for the next token")
    lengths = sorted({row["text_tokens"] for row in rows})
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    machine = rows[0]["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    axis.set_title(f"One reply, {rows[0]['case'].split(',')[0]}, {where}", loc="left", fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    """Draws lines that another machine has measured: LINES PNG."""
    lines, picture = map(Path, argv)
    draw([json.loads(line) for line in lines.read_text().splitlines()], picture)


if __name__ == "__main__":
    main(sys.argv[1:])
