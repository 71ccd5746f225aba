"""Whether a plan fits this machine: memory and disk of what is not built yet. Roughly, but said before hours are lost.

Only for stages that run here without a GPU; what a cluster holds is counted in cluster/.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.config import ModelConfig
from nanochat.flops import parameters
from pipelines.plan import Step
from pipelines.spec import Pretrain, Sft, Tokenizer

# Bytes. Weights, gradient and two moments in fp32; activations as measured eagerly (47 for each position and channel
# of a layer); a worker is a Python with torch; Ray with its object store and dashboard lies beside them.
PER_PARAMETER = 16
PER_ACTIVATION = 47
PER_WORKER = 450_000_000
RAY = 1_300_000_000
# On disk: two checkpoints of weights and moments while it trains, and the weights that are kept.
KEPT_PER_PARAMETER = 2 * 12 + 4
ENCODINGS = {"r50k_base": 50_265, "cl100k_base": 100_264}


@dataclass(frozen=True)
class Need:
    """What one step takes on this machine, in bytes. Roughly."""

    step: Step
    memory: int
    disk: int


def needs(steps: Sequence[Step]) -> list[Need]:
    """What each step takes, in the order of the plan. steps: a whole plan, since sizes come from earlier stages."""
    by_name = {step.name: step for step in steps}
    return [_need(step, by_name) for step in steps]


def shortage(missing: Sequence[Need], memory: int | None, free_disk: int | None) -> str | None:
    """One sentence when the steps that are not built do not fit, else None. None: it cannot be known."""
    worst = max(missing, key=lambda n: n.memory, default=None)
    if worst is not None and memory is not None and worst.memory > memory:
        return (
            f"stage {worst.step.name} needs about {_gib(worst.memory)} of memory, but {_gib(memory)} can be had here; "
            f"close other programs, or choose a smaller place.{worst.step.name}.micro_batch, workers or model"
        )
    disk = sum(n.disk for n in missing)
    if free_disk is not None and disk > free_disk:
        return (
            f"the artifacts need about {_gib(disk)} of disk, but {_gib(free_disk)} are free; "
            "free some (`nanochat gc` lists what is not needed), or choose another disk with --set store=PATH"
        )
    return None


def free_memory() -> int | None:
    """Bytes that can be had: what the kernel says, or less where a container may take less. None where nobody says."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such limit
    return free


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _need(step: Step, by_name: dict[str, Step]) -> Need:
    place = step.place
    memory = RAY + place.most_workers * PER_WORKER
    model = _model(step, by_name)
    if place.gpu is not None or model is None:
        return Need(step, memory if place.gpu is None else 0, 0)
    count = parameters(model, _vocabulary(step, by_name))
    per_worker = count * PER_PARAMETER
    per_worker += PER_ACTIVATION * place.micro_batch * model.context * model.width * model.depth
    return Need(step, memory + place.most_workers * per_worker, count * KEPT_PER_PARAMETER)


def _model(step: Step, by_name: dict[str, Step]) -> ModelConfig | None:
    if isinstance(step.spec, Pretrain):
        return step.spec.model
    return _model(by_name[step.spec.start], by_name) if isinstance(step.spec, Sft) else None


def _vocabulary(step: Step, by_name: dict[str, Step]) -> int:
    """Entries of the one vocabulary that everything above this step uses."""
    while not isinstance(step.spec, Tokenizer):
        step = by_name[next(iter(step.inputs.values()))]
    return step.spec.size or ENCODINGS[str(step.spec.encoding)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
