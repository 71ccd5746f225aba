"""What the benchmarks share: one measurement as a JSON line or a line of a table, and the machine it was made on."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One case, measured several times. A higher value is better."""

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


def measurement(
    bench: str, case: str, rates: Sequence[float], args: argparse.Namespace, more: dict[str, Any]
) -> Measurement:
    """A case whose runs made `rates` tokens/s; args: those of `parse`."""
    return Measurement(
        bench=bench,
        case=case,
        unit="tokens/s",
        value=statistics.median(rates),
        runs=len(rates),
        min=min(rates),
        max=max(rates),
        commit=args.commit,
        machine=machine(torch.device(args.device)),
        more={"precision": args.precision} | more,
    )


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(prog=f"nanochat bench {name}", description=description)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", default=best, choices=("cpu", "cuda"), help="(default: %(default)s)")
    options.add_argument("--precision", choices=tuple(DTYPES), help="(default: bf16 where the processor has it)")
    options.add_argument("--threads", type=whole, default=torch.get_num_threads(), help="(default: %(default)s)")
    options.add_argument("--commit", help="of the code that is measured, to be written into the lines")
    options.add_argument("--json", action="store_true", help="one JSON line a measurement instead of a table")
    return options


def whole(text: str) -> int:
    """An argument that must be a whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with a precision; sets the threads. Exits with 2 if they are wrong."""
    args = options.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: torch finds no CUDA here")
    torch.set_num_threads(args.threads)
    args.precision = args.precision or ("bf16" if has_bf16(args.device) else "fp32")
    return args


def has_bf16(device: str) -> bool:
    """Whether the processor multiplies bf16 itself; where it does not, torch's bf16 is slower than its fp32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
        row = asdict(one)
        more = row.pop("more")
        if as_json:
            print(json.dumps(row | more), flush=True)
            continue
        if number == 0:
            print(", ".join(f"{name} {value}" for name, value in one.machine.items()))
            print(f"{'case':<40} {one.unit:>12} {'min':>12} {'max':>12} {'runs':>5}")
        print(f"{one.case:<40} {one.value:>12,.0f} {one.min:>12,.0f} {one.max:>12,.0f} {one.runs:>5}", flush=True)
        print("    " + ", ".join(f"{name} {_short(value)}" for name, value in more.items()), flush=True)


def _short(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
