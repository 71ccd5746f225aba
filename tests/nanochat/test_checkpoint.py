"""Checkpoints: exact, checked, and never code; model folders that transformers loads."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanochat.attention import Rows
from nanochat.checkpoint import load_model, newest, prune, restore, save, save_model
from nanochat.config import OptimConfig
from nanochat.data import Batch
from nanochat.files import Folder
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


def test_saving_ends_the_future_of_a_run_that_was_given_up(saved: Folder) -> None:
    """After going back to 2 for a damaged 4, the new 3 must be what counts, and what prune keeps."""
    damage(saved, "model.safetensors", "truncated")
    save(saved, 3, *fresh(), {})
    assert newest(saved) == 3
    prune(saved, keep=1)
    assert newest(saved) == 3


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
