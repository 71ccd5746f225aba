"""Checkpoints: exact, checked, and never code; model folders that transformers loads."""

import json
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanochat import checkpoint
from nanochat.attention import Rows
from nanochat.checkpoint import Saver, collect, load_model, newest, prune, restore, save_model
from nanochat.config import OptimConfig
from nanochat.data import Batch
from nanochat.files import File, Files, Folder
from nanochat.model import GPT
from nanochat.optim import Optimizer, build_optimizer
from nanochat.train import TrainPlan, train
from tests.nanochat.sizes import VOCAB, filled, small, some_tokens

OPTIM = OptimConfig(matrix_lr=0.01, embed_lr=0.02)
PLAN = TrainPlan(steps=6, batch_tokens=64, optim=OPTIM)


def batches(number: int) -> tuple[list[Batch], int]:
    return [Batch(some_tokens(2, 32, seed=number), some_tokens(2, 32, seed=100 + number), None)], 64


def fresh(kv_heads: int | None = 2) -> tuple[GPT, Optimizer]:
    model = GPT(small(kv_heads), VOCAB).reset(4)
    return model, build_optimizer(model, OPTIM, "fp32")


def save(files: Files, step: int, model: GPT, optimizer: Optimizer, extra: dict[str, Any]) -> None:
    """Not beside the training, but at once."""
    saver = Saver(files, model, optimizer)
    saver.save(step, extra)
    saver.wait()


@pytest.fixture
def saved(tmp_path: Path) -> Folder:
    """A run of six steps that saved after two and after four."""
    files = Folder(tmp_path)
    model, optimizer = fresh()
    for done in train(model, optimizer, batches, PLAN):
        if done.step in (2, 4):
            save(files, done.step, model, optimizer, {"seen": done.tokens})
    return files


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path: Path, name: str) -> None:
    optim = OptimConfig(name=name, matrix_lr=0.01, embed_lr=0.02)  # type: ignore[arg-type]
    plan = TrainPlan(steps=6, batch_tokens=64, optim=optim)
    files = Folder(tmp_path)
    whole = GPT(small(2), VOCAB).reset(4)
    optimizer = build_optimizer(whole, optim, "fp32")
    losses = []
    for done in train(whole, optimizer, batches, plan):
        losses.append(done.loss)
        if done.step == 3:
            save(files, 3, whole, optimizer, {"note": "ä"})
    resumed = GPT(small(2), VOCAB)
    optimizer = build_optimizer(resumed, optim, "fp32")
    step = newest(files)
    assert step == 3
    assert restore(files, step, resumed, optimizer) == {"note": "ä"}
    assert [done.loss for done in train(resumed, optimizer, batches, plan, start=step)] == losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def damage(files: Folder, name: str, how: str) -> None:
    path = files.path(f"step-00000004/{name}")
    data = bytearray(path.read_bytes())
    if how == "flipped bit":
        data[len(data) // 2] ^= 1
    elif how == "truncated":
        data = data[:-1]
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(saved: Folder, name: str, how: str) -> None:
    assert newest(saved) == 4
    damage(saved, name, how)
    with pytest.warns(RuntimeWarning, match=f"step-00000004/{name}.*going back"):
        assert newest(saved) == 2
    with pytest.raises(ValueError, match=f"step-00000004/{name}"):
        restore(saved, 4, *fresh())


@pytest.mark.parametrize("how", ["flipped bit", "truncated"])
def test_a_damaged_manifest_is_passed_over_with_a_warning(saved: Folder, how: str) -> None:
    damage(saved, "manifest.json", how)
    with pytest.warns(RuntimeWarning, match="step-00000004/"):
        assert newest(saved) == 2


def test_without_a_manifest_nothing_counts(saved: Folder) -> None:
    damage(saved, "manifest.json", "missing")
    assert newest(saved) == 2
    with pytest.raises(ValueError, match=r"step-00000004/manifest\.json is missing"):
        restore(saved, 4, *fresh())
    saved.delete("step-00000002/manifest.json")
    assert newest(saved) is None


class Canary:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "sung")


def test_loading_never_unpickles(saved: Folder, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = saved.put("step-00000004/model.safetensors", pickle.dumps(Canary(canary)))
    manifest = saved.path("step-00000004/manifest.json")
    known = json.loads(manifest.read_text())
    known["model.safetensors"] = {"bytes": evil.bytes, "sha256": evil.sha256}  # whoever writes one writes the other
    manifest.write_text(json.dumps(known))
    with pytest.raises(ValueError, match="no safetensors file"):
        restore(saved, 4, *fresh())
    save_model(saved, filled(small()))
    saved.put("model.safetensors", pickle.dumps(Canary(canary)))
    with pytest.raises(ValueError, match="no safetensors file"):
        load_model(saved, torch.float32)
    assert not canary.exists()


def test_another_shape_is_refused_by_name(saved: Folder) -> None:
    model, optimizer = fresh(kv_heads=1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.k_proj\.weight has shape \(16, 32\), not \(8"):
        restore(saved, 4, model, optimizer)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_prune_keeps_the_newest_and_nothing_half_written(saved: Folder) -> None:
    model, optimizer = fresh()
    save(saved, 5, model, optimizer, {})
    saved.put("step-00000006/model.safetensors", b"half")
    saved.put("index.json", b"of someone else")
    prune(saved, keep=2)
    folders = {name.partition("/")[0] for name in saved.list()}
    assert folders == {"index.json", "step-00000004", "step-00000005"}
    assert newest(saved) == 5


def test_a_start_ends_the_future_of_a_run_that_was_given_up(saved: Folder) -> None:
    """After going back to 2 for a damaged 4, the new 3 must be what counts, and what is kept."""
    damage(saved, "model.safetensors", "truncated")
    saved.put("step-00000001/state.json", b"half")
    collect(saved, 2)
    assert {name.partition("/")[0] for name in saved.list()} == {"step-00000002"}
    save(saved, 3, *fresh(), {})
    assert newest(saved) == 3


def everything(model: GPT, optimizer: Optimizer) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *optimizer.state_dict().items()]


class Slow(Folder):
    """Writes nothing before it is let."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may = threading.Event()

    def put(self, name: str, data: bytes | Path) -> File:
        assert self.may.wait(30)
        return super().put(name, data)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """What is written is the state when it was saved, though the weights have moved since."""
    files, committed = Slow(tmp_path), []
    model, optimizer = fresh()
    saver = Saver(files, model, optimizer, committed=committed.append)
    then: dict[str, torch.Tensor] = {}
    for done in train(model, optimizer, batches, PLAN):
        if done.step == 2:
            saver.save(2, {})
            then = {
                name: w.detach().clone() for name, w in [*model.named_parameters(), *optimizer.state_dict().items()]
            }
        assert saver.busy == (done.step >= 2)
    assert newest(files) is None
    assert not committed
    files.may.set()
    saver.wait()
    assert not saver.busy
    assert newest(files) == 2
    assert committed == [2]
    back, state = fresh()
    restore(files, 2, back, state)
    for name, tensor in everything(back, state):
        assert torch.equal(tensor, then[name]), name
    assert any(not torch.equal(w, then[name]) for name, w in model.named_parameters())


def until_idle(saver: Saver) -> None:
    while saver.busy:
        pass


def test_what_goes_wrong_while_writing_is_said_at_the_next_look(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saver = Saver(Folder(tmp_path / "file"), *fresh())
    saver.save(2, {})
    with pytest.raises(NotADirectoryError):
        until_idle(saver)
    assert not saver.busy


class Dead(BaseException):
    """The process is gone."""


class Mortal(Folder):
    """Of a process that dies after some operations; a write is then half done."""

    def __init__(self, root: Path, operations: int) -> None:
        super().__init__(root)
        self.left = operations

    def _live(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Dead

    def put(self, name: str, data: bytes | Path) -> File:
        if self.left == 0:
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
            (self.path(name).parent / ".put-half").write_bytes(b"half")
        self._live()
        return super().put(name, data)

    def delete(self, name: str) -> None:
        self._live()
        super().delete(name)


@pytest.mark.parametrize("operations", range(27))
def test_a_death_at_any_moment_loses_nothing_that_was_committed(tmp_path: Path, operations: int) -> None:
    files, committed = Mortal(tmp_path, operations), [0]
    model, optimizer = fresh()
    saver = Saver(files, model, optimizer, committed=committed.append)
    try:
        for step in (1, 2, 3, 4):
            saver.save(step, {"at": step})
            saver.wait()
    except Dead:
        pass
    else:
        assert operations == 26  # four checkpoints of four files, of which two are deleted again
    after = Folder(tmp_path)
    start = newest(after) or 0
    assert start in (committed[-1], committed[-1] + 1)  # the manifest may be there, and nobody was told yet
    collect(after, start)
    kept = [step for step in (start - 1, start) if step > 0]
    assert {name.partition("/")[0] for name in after.list()} == {f"step-{step:08d}" for step in kept}
    for step in kept:
        assert restore(after, step, *fresh()) == {"at": step}


class Part:
    """An optimizer that holds a part of the state."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state = state

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return self.state


def split(state: Mapping[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """As ZeRO-1 does: whole tensors in turn, and of one the rows."""
    rows = "exp_avg.lm_head.weight"
    pieces: list[dict[str, torch.Tensor]] = [{"steps": state["steps"]} for _ in range(parts)]
    for number, name in enumerate(sorted(set(state) - {"steps", rows})):
        pieces[number % parts][name] = state[name]
    bounds = [len(state[rows]) * part // parts for part in range(parts + 1)]
    for piece, begin, end in zip(pieces, bounds, bounds[1:], strict=False):
        piece[f"{rows}@{begin}"] = state[rows][begin:end]
    return pieces


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Callable[[int], Saver]]:
    """Savers of three ranks that each hold a part of one training's state."""
    model, optimizer = fresh()
    list(train(model, optimizer, batches, PLAN))
    pieces = split(optimizer.state_dict(), 3)
    savers: list[Saver] = []

    def make(rank: int) -> Saver:
        savers.append(Saver(Folder(tmp_path), model, Part(pieces[rank]), rank=rank, parts=3))  # type: ignore[arg-type]
        return savers[-1]

    yield make
    for saver in savers:
        saver.wait()


def test_what_three_ranks_wrote_one_reads(tmp_path: Path, three: Callable[[int], Saver]) -> None:
    files = Folder(tmp_path)
    savers = [three(rank) for rank in (2, 0, 1)]
    for saver in savers[:2]:
        saver.save(6, {"seen": 5})
    savers[0].wait()
    assert savers[1].busy  # for the part of rank 1
    assert newest(files) is None
    savers[2].save(6, {})
    for saver in savers:
        saver.wait()
    assert newest(files) == 6
    whole, state = fresh()
    list(train(whole, state, batches, PLAN))
    back, read = fresh()
    assert restore(files, 6, back, read) == {"seen": 5}
    expected = dict(everything(whole, state))
    for name, tensor in everything(back, read):
        assert torch.equal(tensor, expected[name]), name
    parts = [f"optim-{rank:05d}-of-00003.safetensors" for rank in range(3)]
    folder = {path.name for path in (tmp_path / "step-00000006").iterdir()}
    assert folder == {*parts, "model.safetensors", "state.json", "manifest.json"}


@pytest.mark.parametrize("how", ["flipped bit", "missing"])
def test_one_damaged_part_is_a_damaged_checkpoint(tmp_path: Path, three: Callable[[int], Saver], how: str) -> None:
    for saver in (savers := [three(rank) for rank in range(3)]):
        saver.save(4, {})
    for saver in savers:
        saver.wait()
    damage(Folder(tmp_path), "optim-00001-of-00003.safetensors", how)
    with pytest.warns(RuntimeWarning, match="step-00000004/optim-00001-of-00003"):
        assert newest(Folder(tmp_path)) is None


def test_a_rank_that_writes_nothing_is_named(three: Callable[[int], Saver], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PATIENCE_S", 0.2)
    first, last = three(0), three(2)
    first.save(6, {})
    last.save(6, {})
    with pytest.raises(TimeoutError, match="rank 1 has not written its part of step-00000006/ within"):
        first.wait()


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_transformers_loads_the_folder(tmp_path: Path, kv_heads: int | None) -> None:
    model = filled(small(kv_heads, depth=4))
    written = save_model(Folder(tmp_path), model)
    assert sorted(file.path for file in written) == ["config.json", "model.safetensors"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa")
    tokens = some_tokens(2, 60)
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        ours = model.logits(model(tokens, Rows()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    model = filled(small(2))
    save_model(Folder(tmp_path), model, dtype)
    back = load_model(Folder(tmp_path), dtype)
    assert (back.config, back.vocab_size, back.dtype) == (model.config, VOCAB, dtype)
    for (name, a), b in zip(model.named_parameters(), back.parameters(), strict=True):
        assert b.dtype == dtype
        assert torch.equal(a.to(dtype), b), name


def test_a_model_folder_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    files = Folder(tmp_path)
    save_model(files, filled(small(2)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "aspect": 10}))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.fc1\.weight is missing"):
        load_model(files, torch.float32)
