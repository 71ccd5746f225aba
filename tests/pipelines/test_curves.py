"""What is said of a training's steps, against sums done by hand, and files that other programs must be able to read."""

import gzip
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pynvml import NVMLError_NotSupported

from nanochat.config import ModelConfig
from nanochat.files import Folder
from nanochat.machine import PEAK_FLOPS_PER_S, measured_flops_per_s, stated_flops_per_s
from nanochat.train import StepDone
from pipelines import curves
from pipelines.curves import LiveCurves, Observer, busy_gpu, event_file, numbers, shares, summary, traced
from pipelines.metrics import UNITS

TINY = ModelConfig(depth=1, context=128, head_dim=64)
PARTS = {"data": 0.1, "forward": 0.6, "backward": 1.0, "exchange": 0.1, "optimizer": 0.2, "other": 0.0}


def done(step: int, **changes: Any) -> StepDone:
    told = {
        "step": step,
        "steps": 40,
        "loss": 5.0,
        "grad_norm": 1.0,
        "rate": 0.5,
        "tokens": step * 128,
        "tokens_per_s": 64.0,
        "seconds": 2.0,
        "parts": PARTS,
        "skew_s": 0.25,
        "skipped": 0,
    }
    return StepDone(**(told | changes))


def row(step: int, **changes: Any) -> dict[str, Any]:
    more = {"unix_s": 1e9 + step, "mfu": 0.25, "peak_flops_per_s": 1e12, "peak_bytes": 10**9, "busy_cores": 1.9}
    more |= {"busy_gpu": None}
    told = more | {name: changes.pop(name) for name in more if name in changes}
    return asdict(done(step, **changes)) | told


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_its_name(gpu: str, tflops: float | None) -> None:
    stated = stated_flops_per_s(gpu)
    assert stated == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_every_gpu_that_a_place_may_name_has_a_peak() -> None:
    from typing import get_args

    from pipelines.spec import GpuName

    assert set(get_args(GpuName)) <= set(PEAK_FLOPS_PER_S)


def test_a_row_says_what_the_model_computes_of_what_the_machine_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "peak_flops_per_s", lambda device, dtype: 4e6 if dtype == torch.bfloat16 else 1e6)
    one = Observer(TINY, 300, torch.device("cpu"), torch.bfloat16, world=2).row(done(3))
    width = 64
    weights = 12 * width**2 + 300 * width  # of attention 4, of the MLP 8; and the head
    flops = 6 * weights + 12 * width * 128
    assert one["mfu"] == pytest.approx(64.0 * flops / (2 * 4e6))
    assert one["peak_flops_per_s"] == 8e6
    assert 50e6 < one["peak_bytes"] < 64e9
    assert 0 <= one["busy_cores"] < 5
    assert one["busy_gpu"] is None
    assert {name: one[name] for name in asdict(done(3))} == asdict(done(3))
    assert json.loads(json.dumps(one)) == one


def test_a_row_says_how_busy_the_gpu_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVML says in percent; this never ran on a GPU."""

    def silent(device: torch.device) -> int:
        raise NVMLError_NotSupported  # as of a part of a GPU

    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: {gpu: 97}[device])
    assert busy_gpu(gpu) == 0.97
    monkeypatch.setattr(torch.cuda, "utilization", silent)
    assert busy_gpu(gpu) is None


def test_a_product_of_matrices_is_measured() -> None:
    """Any machine does more than 1 and less than 100,000 GFLOP/s; twice in a row it is about the same."""
    found = [measured_flops_per_s(torch.device("cpu"), torch.float32) for _ in range(2)]
    assert 1e9 < min(found) <= max(found) < 1e14
    assert max(found) < 5 * min(found)


def test_shares_add_up_to_one() -> None:
    found = shares(row(1))
    assert sum(found.values()) == pytest.approx(1)
    assert found["share_backward"] == pytest.approx(0.5)
    assert set(found) == {f"share_{part}" for part in PARTS}
    assert shares(row(1, parts={})) == {}  # on a GPU before the first step is complete


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, "share_data"),  # 5% of the step, and more than 2% is unusual
        ({"data": 0.0}, None),
        ({"data": 0.0, "exchange": 1.0}, "share_exchange"),
        ({"data": 0.1, "other": 1.0}, "share_other"),  # further beyond what is usual than the data
        ({"data": 0.0, "forward": 9.0}, None),  # what a step is for
    ],
)
def test_the_terminal_shows_the_share_that_is_unusual(changed: dict[str, float], shown: str | None) -> None:
    found = numbers(row(1, parts=PARTS | changed))
    assert {name for name in found if name.startswith("share")} == ({shown} if shown else set())
    assert (found["train_loss"], found["tokens_per_s"], found["mfu"]) == (5.0, 64.0, 0.25)
    assert set(found) <= set(UNITS)


def test_the_summary_of_a_training() -> None:
    rows = [row(step, loss=float(step), seconds=1.0 + step % 3, mfu=step / 100) for step in range(1, 41)]
    rows[7] |= {"parts": {}, "peak_bytes": 7 * 10**9}
    rows[9]["parts"] = {part: 38 * s for part, s in PARTS.items()}  # as all the others together,
    rows[9]["parts"]["other"] = 38 * 2.0  # and as long again on nothing
    assert "busy_gpu" not in summary(rows)  # nor is it said of a training without one
    for number in (1, 2, 3):
        rows[number]["busy_gpu"] = 0.3 * number
    found = summary(rows)
    assert found["busy_gpu"] == pytest.approx(0.6)
    assert found["train_loss"] == (39 + 40) / 2  # the last 5%
    assert (found["train_steps"], found["train_tokens"]) == (40, 40 * 128)
    assert (found["step_s"], found["tokens_per_s"], found["mfu"]) == (2.0, 64.0, pytest.approx(0.205))
    assert found["peak_bytes"] == 7 * 10**9
    assert sum(found[name] for name in curves.SHARES) == pytest.approx(1)
    assert found["share_other"] == pytest.approx(1 / 3)
    assert found["rank_skew_s"] == 0.25
    assert set(found) <= set(UNITS)


def test_a_step_that_moved_nothing_is_counted_and_has_no_say() -> None:
    rows = [row(1, loss=4.0), row(2, loss=float("nan"), skipped=1), row(3, grad_norm=float("inf"), skipped=2)]
    found = summary([*rows, row(4, loss=float("inf"), skipped=3)])
    assert found["skipped_steps"] == 3
    assert (found["train_loss"], found["grad_norm"], found["train_steps"]) == (4.0, 1.0, 4)
    assert event_file(rows)  # TensorBoard shows gaps


def records(file: bytes) -> Iterator[bytes]:
    """Of TensorFlow's record format: length, its checksum, data, its checksum."""
    while file:
        (length,) = struct.unpack_from("<Q", file)
        yield file[12 : 12 + length]
        file = file[12 + length + 4 :]


def test_tensorboard_can_read_every_step() -> None:
    from tensorboardX.proto.event_pb2 import Event

    rows = [row(step, loss=step / 8, skew_s=0.5) for step in (1, 2, 1500)] + [row(1501, parts={})]
    first, *events = [Event.FromString(record) for record in records(event_file(rows))]
    assert first.file_version == "brain.Event:2"
    assert [event.step for event in events] == [1, 2, 1500, 1501]
    assert [event.wall_time for event in events] == [1e9 + step for step in (1, 2, 1500, 1501)]
    curve = {tag: [] for tag in ("train/loss", "step/share_backward", "speed/skew_s")}  # type: dict[str, list[float]]
    for event in events:
        for value in event.summary.value:
            curve.setdefault(value.tag, []).append(value.simple_value)
    assert curve["train/loss"] == [1 / 8, 2 / 8, 1500 / 8, 5.0]
    assert curve["step/share_backward"] == [0.5] * 3
    assert curve["speed/skew_s"] == [0.5] * 3 + [0.25]
    assert len(curve["speed/mfu"]) == 4


def steps_of(folder: Path) -> dict[str, list[int]]:
    from tensorboardX.proto.event_pb2 import Event

    files = {path.suffix.removeprefix("."): path.read_bytes() for path in folder.glob("tensorboard/*")}
    return {name: [Event.FromString(record).step for record in records(data)][1:] for name, data in files.items()}


def test_tensorboard_can_follow_a_training_and_its_restarts(tmp_path: Path) -> None:
    files, history = Folder(tmp_path), [row(1)]
    live = LiveCurves(files, history)
    history += [row(2), row(3)]
    live.draw(2)
    history.append(row(4))
    live.draw(4)
    assert steps_of(tmp_path) == {"00000002": [2], "00000004": [3, 4]}
    history = [row(1), row(2), row(3)]  # the checkpoint of step 4 was damaged
    live = LiveCurves(files, history)
    history += [row(4), row(5)]
    live.draw(5)
    assert steps_of(tmp_path) == {"00000002": [2], "00000005": [4, 5]}
    live.end()
    assert steps_of(tmp_path) == {}


@pytest.mark.parametrize(("start", "wanted"), [(0, [3, 4]), (3, [4]), (4, [])])
def test_steps_of_a_window_are_traced(start: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[torch.profiler.profile] = []
    profile = torch.profiler.profile
    monkeypatch.setattr(torch.profiler, "profile", lambda: begun.append(profile()) or begun[-1])

    def steps() -> Iterator[StepDone]:
        for number in range(start + 1, 7):
            with torch.profiler.record_function(f"step {number}"):
                torch.ones(8) @ torch.ones(8)
            yield done(number, steps=6)

    kept: list[bytes] = []
    assert [one.step for one in traced(steps(), (3, 4), start, kept.append)] == list(range(start + 1, 7))
    assert len(kept) == len(begun) == bool(wanted)
    if wanted:
        events = json.loads(gzip.decompress(kept[0]))["traceEvents"]
        names = [event.get("name", "") for event in events if event.get("ph") == "X"]
        assert sorted({name for name in names if name.startswith("step ")}) == [f"step {number}" for number in wanted]
        assert any(name.startswith("aten::") for name in names)


def test_a_window_beyond_the_last_step_ends_with_it() -> None:
    kept: list[bytes] = []
    assert len(list(traced(iter([done(1, steps=2), done(2, steps=2)]), (2, 99), 0, kept.append))) == 2
    assert len(kept) == 1
