"""What people look at of a training: how fast it is, how much of the machine it uses, where the time of a step goes.

A row is one step as steps.jsonl holds it: `asdict(StepDone)`, and what `Observer.row` adds in the process that trains.
"""

import gzip
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from pynvml import NVMLError

from nanochat.config import ModelConfig
from nanochat.files import Files
from nanochat.flops import flops_per_token
from nanochat.machine import peak_bytes, peak_flops_per_s
from nanochat.train import StepDone

Row = dict[str, Any]

EVENTS = "tensorboard/events.out.tfevents.steps"  # in the artifact; TensorBoard looks for "tfevents" in a name
TRACE = "trace.json.gz"  # in the artifact; for https://ui.perfetto.dev
# What the shares of a step are called -> the part of `nanochat.clock`
SHARES = {
    "share_data": "data",
    "share_forward": "forward",
    "share_backward": "backward",
    "share_exchange": "exchange",
    "share_optimizer": "optimizer",
    "share_other": "other",
}
# A share that takes more than this is worth a look; forward and backward are what a step is for.
USUAL = {"share_data": 0.02, "share_exchange": 0.15, "share_optimizer": 0.25, "share_other": 0.1}


class Observer:
    """Lives in the process that trains, beside its loop, and adds to each step what the process itself costs."""

    def __init__(self, model: ModelConfig, vocab_size: int, device: torch.device, dtype: torch.dtype, world: int):
        """Takes a fifth of a second on a CPU, whose best products are measured."""
        self._flops_per_token = flops_per_token(model, vocab_size)
        self._device = device
        self._peak = world * peak_flops_per_s(device, dtype)
        self._cpu_s = time.process_time()

    def row(self, done: StepDone) -> Row:
        """The step as steps.jsonl holds it. To be called once a step."""
        cpu_s, self._cpu_s = self._cpu_s, time.process_time()
        return asdict(done) | {
            "unix_s": time.time(),
            "mfu": done.tokens_per_s * self._flops_per_token / self._peak,
            "peak_flops_per_s": self._peak,
            "peak_bytes": peak_bytes(self._device),
            "busy_cores": (self._cpu_s - cpu_s) / done.seconds,
            "busy_gpu": busy_gpu(self._device),
        }


def busy_gpu(device: torch.device) -> float | None:
    """The share of the last second, or less, in which a GPU ran anything at all; None if it does not say, as MIG does.

    It tells waiting from working, not how well the GPU works: `mfu` does. NVML counts it, and nothing waits for it.
    """
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except (NVMLError, RuntimeError):
        return None


def shares(row: Row) -> dict[str, float]:
    """Of the step's time, by name in SHARES; they add up to 1. Empty where the step's parts were not known yet."""
    total = sum(row["parts"].values())
    return {name: row["parts"][part] / total for name, part in SHARES.items()} if total else {}


def numbers(row: Row) -> dict[str, float]:
    """What is shown while it trains: the share that is furthest beyond what is usual is among them."""
    found = {"train_loss": row["loss"], "tokens_per_s": row["tokens_per_s"], "mfu": row["mfu"]}
    beyond = {name: share / USUAL[name] for name, share in shares(row).items() if name in USUAL}
    worst = max(beyond, key=beyond.__getitem__, default="")
    if worst and beyond[worst] > 1:
        found[worst] = shares(row)[worst]
    return found


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """The metrics of a whole training, restarts included."""
    moved = [row for row in rows if isfinite(row["loss"]) and isfinite(row["grad_norm"])]
    if not moved:
        raise FloatingPointError(f"no weight moved: of none of the {len(rows)} steps loss and gradient were finite")
    tail = moved[-max(1, len(rows) // 20) :]
    parts = {part: sum(row["parts"].get(part, 0.0) for row in rows) for part in SHARES.values()}
    gpu = [row["busy_gpu"] for row in rows if row["busy_gpu"] is not None]
    return {
        "train_loss": statistics.fmean(row["loss"] for row in tail),
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows),
        "train_tokens": rows[-1]["tokens"],
        "train_steps": rows[-1]["step"],
        "step_s": statistics.median(row["seconds"] for row in rows),
        "mfu": statistics.median(row["mfu"] for row in rows),
        "peak_flops_per_s": rows[-1]["peak_flops_per_s"],
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "busy_cores": statistics.median(row["busy_cores"] for row in rows),
        **({"busy_gpu": statistics.median(gpu)} if gpu else {}),
        "rank_skew_s": statistics.median(row["skew_s"] for row in rows),
        "grad_norm": statistics.median(row["grad_norm"] for row in moved),
        "skipped_steps": rows[-1]["skipped"],
        **shares({"parts": parts}),
    }


def event_file(rows: Sequence[Row]) -> bytes:
    """The same for TensorBoard: one event a step, with the step's number."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events"
        file = RecordWriter(str(path))
        file.write(Event(file_version="brain.Event:2").SerializeToString())
        for row in rows:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(row).items()]
            event = Event(wall_time=row["unix_s"], step=row["step"], summary=Summary(value=values))
            file.write(event.SerializeToString())
        file.close()
        return path.read_bytes()


class LiveCurves:
    """What TensorBoard can show of a training that runs: in its work, a file of the steps of each checkpoint."""

    def __init__(self, work: Files, history: Sequence[Row]) -> None:
        """history: of all steps, to which others append; what it holds now is what a restart goes on from."""
        self._work, self._history, self._drawn = work, history, len(history)
        self._delete_after(self._drawn)

    def draw(self, step: int) -> None:
        """Writes the steps up to this one that no file has yet."""
        self._work.put(f"{EVENTS}.{step:08d}", event_file(self._history[self._drawn : step]))
        self._drawn = step

    def end(self) -> None:
        """Deletes the files: the artifact has one of all steps."""
        self._delete_after(0)

    def _delete_after(self, step: int) -> None:
        for name in self._work.list(EVENTS):
            if int(name.rpartition(".")[2]) > step:
                self._work.delete(name)


def traced(
    steps: Iterator[StepDone], window: tuple[int, int], start: int, keep: Callable[[bytes], object]
) -> Iterator[StepDone]:
    """The same steps; those from `window[0]` to `window[1]` (the first is 1) are traced, and `keep` gets the trace.

    start: steps done before. Of a window that began before, what is left is traced; of one that is over, nothing.
    """
    first, last = window
    profiler: torch.profiler.profile | None = None
    try:
        for number in count(start + 1):
            if first <= number <= last and profiler is None:
                profiler = torch.profiler.profile()
                profiler.start()
            done = next(steps, None)
            if done is None:
                return
            if profiler is not None and number == min(last, done.steps):
                profiler.stop()
                keep(_chrome_trace(profiler))
                profiler = None
            yield done
    finally:
        if profiler is not None:  # one that is left running crashes the process at its end
            profiler.stop()


def _chrome_trace(profiler: torch.profiler.profile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return gzip.compress(path.read_bytes())


def _scalars(row: Row) -> dict[str, float]:
    """By TensorBoard's tag: what stands before the slash is a group of curves."""
    return {
        "train/loss": row["loss"],
        "train/grad_norm": row["grad_norm"],
        "train/rate": row["rate"],
        "train/tokens": row["tokens"],
        "train/skipped": row["skipped"],
        "speed/tokens_per_s": row["tokens_per_s"],
        "speed/step_s": row["seconds"],
        "speed/mfu": row["mfu"],
        "speed/busy_cores": row["busy_cores"],
        **({} if row["busy_gpu"] is None else {"speed/busy_gpu": row["busy_gpu"]}),
        "speed/peak_bytes": row["peak_bytes"],
        "speed/skew_s": row["skew_s"],
        **{f"step/{name}": share for name, share in shares(row).items()},
    }
