from pathlib import Path

from pipelines.load import load
from pipelines.plan import plan
from pipelines.room import free_disk, free_memory, needs, shortage
from tests.pipelines.fakes import FILE, steps_of


def test_a_plan_that_does_not_fit_is_said_in_one_sentence() -> None:
    need = needs(steps_of())
    assert shortage(need, 8 << 30, 10 << 30) is None
    assert shortage(need, None, None) is None
    assert shortage([], 0, 0) is None
    said = shortage(need, 1 << 30, 10 << 30)
    assert said is not None
    assert "of memory, but 1.0 GiB can be had here" in said
    said = shortage(need, 8 << 30, 1 << 20)
    assert said is not None
    assert "of disk, but 0.0 GiB are free" in said


def test_need_grows_with_the_model_the_batch_and_the_workers() -> None:
    def memory(*sets: str) -> int:
        return {n.step.name: n.memory for n in needs(plan(load(FILE, "laptop", sets)))}["base"]

    small = memory()
    assert memory("place.base.micro_batch=16") - small == 8 * 512 * 192 * 3 * 47
    assert memory("base.model.depth=6") > small
    assert memory("vocabulary.size=8192") - small == 16 * 2 * 192 * 4096
    # A second worker brings its own Python, weights and activations.
    assert memory("place.base.workers=2") - small == small - 1_300_000_000


def test_what_runs_on_a_gpu_is_not_counted_here() -> None:
    need = {n.step.name: n for n in needs(plan(load(FILE, "h200x1")))}
    assert need["base"].memory == need["base"].disk == 0
    assert need["vocabulary"].memory > 0


def test_this_machine_has_something_to_offer(tmp_path: Path) -> None:
    memory = free_memory()
    assert memory is None or memory > 1 << 20
    assert free_disk(tmp_path / "not" / "made" / "yet") > 0
