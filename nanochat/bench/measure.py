"""What the benchmarks share: one measurement as a JSON line or a line of a table, and the machine it was made on."""

import argparse
import json
import os
import platform
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.machine import cpu_has_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One case, measured several times. Of tokens/s more is better; of seconds and shares less is."""

    bench: str
    case: str
    unit: str
    value: float  # median
    baseline: str | None = None  # what it is compared with
    baseline_value: float | None = None
    ratio: float | None = None  # above 1: better than the baseline
    runs: int
    min: float
    max: float
    commit: str | None
    machine: dict[str, Any]
    more: dict[str, Any]  # what else was measured, or decides the case

    def as_dict(self) -> dict[str, Any]:
        """As it is printed: `more` among the rest."""
        row: dict[str, Any] = asdict(self)
        more: dict[str, Any] = row.pop("more")
        return row | more

    def against(self, baseline: str, rates: Sequence[float]) -> "Measurement":
        """The same beside the tokens/s, or the seconds, that the baseline's runs made."""
        other = statistics.median(rates)
        ratio = other / self.value if self.unit == "s" else self.value / other
        return replace(self, baseline=baseline, baseline_value=other, ratio=ratio)


def measurement(
    bench: str,
    case: str,
    values: Sequence[float],
    args: argparse.Namespace,
    more: dict[str, Any],
    *,
    unit: str = "tokens/s",
) -> Measurement:
    """A case with one value a run; args: those of `parse`."""
    return Measurement(
        bench=bench,
        case=case,
        unit=unit,
        value=statistics.median(values),
        runs=len(values),
        min=min(values),
        max=max(values),
        commit=args.commit,
        machine=machine(torch.device(args.device)),
        more={"precision": args.precision} | more,
    )


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; its precisions are its own."""
    options = argparse.ArgumentParser(prog=f"nanochat bench {name}", description=description)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", default=best, choices=("cpu", "cuda"), help="(default: %(default)s)")
    options.add_argument("--threads", type=whole, default=torch.get_num_threads(), help="(default: %(default)s)")
    options.add_argument("--commit", help="of the code that is measured, to be written into the lines")
    options.add_argument("--json", action="store_true", help="one JSON line a measurement instead of a table")
    return options


def at_least(least: int) -> Callable[[str], int]:
    """Reads an argument that must be a whole number of `least` or more."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return read


whole = at_least(1)


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; sets the threads. Exits with 2 if they are wrong."""
    args = options.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: torch finds no CUDA here")
    torch.set_num_threads(args.threads)
    return args


def best_precision(device: str) -> str:
    """bf16 where the device multiplies it itself."""
    able = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else cpu_has_bf16()
    return "bf16" if able else "fp32"


def machine(device: torch.device) -> dict[str, Any]:
    """Where it was measured."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Its name as Linux knows it, or as Python does elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(measured: Iterable[Measurement], *, as_json: bool) -> None:
    """Print each as soon as it is there."""
    for number, one in enumerate(measured):
        if as_json:
            print(json.dumps(one.as_dict()), flush=True)
            continue
        if number == 0:
            print(", ".join(f"{name} {value}" for name, value in one.machine.items()))
            print(f"{'case':<36} {'median':>11} {'min':>11} {'max':>11} {'runs':>5}  {'unit':<9} ratio")
        numbers = " ".join(f"{_short(value):>11}" for value in (one.value, one.min, one.max))
        ratio = f"{one.ratio:.2f} x {_short(one.baseline_value)} of {one.baseline}" if one.ratio else ""
        print(f"{one.case:<36} {numbers} {one.runs:>5}  {one.unit:<9} {ratio}".rstrip(), flush=True)
        told = ", ".join(f"{name} {_short(value)}" for name, value in one.more.items())
        print(textwrap.fill(told, 116, initial_indent="    ", subsequent_indent="    "), flush=True)


def _short(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_short(part)}" for name, part in value.items()) + ")"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
