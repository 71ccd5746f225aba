"""Weights and training state as files: safetensors and JSON, never pickle.

A model folder is what transformers loads: config.json and model.safetensors.
A checkpoint lies in step-00000100/ and counts from the moment its manifest.json, written last, is there.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.files import File, Files
from nanochat.loss import CAP
from nanochat.model import EPS, GPT, ROPE_BASE, weight_shapes
from nanochat.optim import Optimizer, check_shapes, copy_in
from nanochat.weights import StoredWeights

MODEL: Final = "model.safetensors"
OPTIM: Final = "optim.safetensors"
STATE: Final = "state.json"
MANIFEST: Final = "manifest.json"
CONFIG: Final = "config.json"


def save_model(files: Files, model: GPT, dtype: torch.dtype | None = None) -> list[File]:
    """Write config.json and model.safetensors, as transformers reads them.

    dtype: of the weights in the file; None: as they are.
    """
    weights = {name: weight.detach().to("cpu", dtype) for name, weight in model.named_parameters()}
    stored = next(iter(weights.values())).dtype
    config = transformers_config(model.config, model.vocab_size, stored)
    return [
        files.put(MODEL, encode(weights, metadata={"format": "pt"})),
        files.put(CONFIG, json.dumps(config, indent=2).encode()),
    ]


def load_model(files: Files, dtype: torch.dtype, device: torch.device | str = "cpu") -> GPT:
    """A model whose weights are kept, and whose forward is computed, in `dtype`.

    To train it in bf16, load it in fp32 and set `model.dtype`. ValueError names a tensor that does not fit.
    """
    config, vocab_size = read_config(files)
    with files.open(MODEL) as file:
        weights = _decode(MODEL, file.read())
    model = GPT(config, vocab_size, dtype)
    for weight in model.parameters():
        weight.data = weight.data.to(device, dtype)
    _copy_weights(model, weights)
    return model


@contextmanager
def open_weights(files: Files) -> Iterator[tuple[ModelConfig, int, StoredWeights]]:
    """Sizes of a saved model, of its vocabulary, and its weights, to be read inside the block.

    ValueError names all that do not fit.
    """
    config, vocab_size = read_config(files)
    with files.open(MODEL) as file:
        try:
            weights = StoredWeights(file)
        except ValueError as error:
            raise ValueError(f"{MODEL}: {error}") from error
        check_shapes(weight_shapes(config, vocab_size), weights.shapes)
        yield config, vocab_size, weights


def read_config(files: Files) -> tuple[ModelConfig, int]:
    """Sizes of a saved model, and of its vocabulary."""
    with files.open(CONFIG) as file:
        sizes = json.load(file)
    config = ModelConfig(
        depth=sizes["num_hidden_layers"],
        context=sizes["max_position_embeddings"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        aspect=sizes["aspect"],
    )
    return config, int(sizes["vocab_size"])


def transformers_config(config: ModelConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of NanoChatForCausalLM; `aspect` is ours, transformers carries it along.

    The token ids are left to generation_config.json, which knows the vocabulary.
    """
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "final_logit_softcapping": CAP,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "aspect": config.aspect,
    }


def save(files: Files, step: int, model: GPT, optimizer: Optimizer, extra: dict[str, Any]) -> None:
    """Write the checkpoint of `step` done steps; extra: JSON data of the caller.

    It replaces one of the same step. Later ones are deleted: they belong to a run that was given up for this one.
    """
    folder = _folder(step)
    files.delete(folder + MANIFEST)  # from here on the old one does not count
    weights = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    state = {name: tensor.cpu().contiguous() for name, tensor in optimizer.state_dict().items()}
    written = [
        files.put(folder + MODEL, encode(weights)),
        files.put(folder + OPTIM, encode(state)),
        files.put(folder + STATE, json.dumps({"step": step, "extra": extra}).encode()),
    ]
    manifest = {file.path.removeprefix(folder): {"bytes": file.bytes, "sha256": file.sha256} for file in written}
    files.put(folder + MANIFEST, json.dumps(manifest, indent=2).encode())
    for other in _steps(files):
        if other > step:
            _delete(files, other)


def newest(files: Files) -> int | None:
    """The last step whose checkpoint is committed and undamaged, every byte read; None if there is none.

    Warns (RuntimeWarning) of each damaged one that it passes over.
    """
    for step in reversed(_committed(files)):
        try:
            _read(files, step)
        except ValueError as error:
            warnings.warn(f"{error}; going back to the checkpoint before", RuntimeWarning, stacklevel=2)
        else:
            return step
    return None


def restore(files: Files, step: int, model: GPT, optimizer: Optimizer) -> dict[str, Any]:
    """Copy a checkpoint into model and optimizer and return its `extra`.

    ValueError if a file is damaged, or names the tensors that do not fit; model and optimizer are then unchanged or,
    if only the optimizer's do not fit, to be thrown away.
    """
    read = _read(files, step)
    _copy_weights(model, _decode(_folder(step) + MODEL, read[MODEL]))
    optimizer.load_state_dict(_decode(_folder(step) + OPTIM, read[OPTIM]))
    extra: dict[str, Any] = json.loads(read[STATE])["extra"]
    return extra


def prune(files: Files, keep: int = 2) -> None:
    """Delete all but the newest `keep` checkpoints, and whatever was never committed. Not while another one saves."""
    kept = _committed(files)[-keep:] if keep else []
    for step in _steps(files):
        if step not in kept:
            _delete(files, step)


def _folder(step: int) -> str:
    return f"step-{step:08d}/"


def _steps(files: Files) -> list[int]:
    """Every step of which there is any file."""
    return sorted({int(name[5:13]) for name in files.list("step-")})


def _committed(files: Files) -> list[int]:
    return sorted(int(name[5:13]) for name in files.list("step-") if name.endswith("/" + MANIFEST))


def _delete(files: Files, step: int) -> None:
    """The manifest first: what is half deleted must not count."""
    folder = _folder(step)
    for name in [folder + MANIFEST, *files.list(folder)]:
        files.delete(name)


def _read(files: Files, step: int) -> dict[str, bytes]:
    """All files of a checkpoint, checked against its manifest. ValueError names the first that is damaged."""
    folder = _folder(step)
    try:
        with files.open(folder + MANIFEST) as file:
            manifest = json.load(file)
        expected = {name: (manifest[name]["bytes"], manifest[name]["sha256"]) for name in (MODEL, OPTIM, STATE)}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}{MANIFEST} is missing or damaged: {error!r}") from error
    read = {}
    for name, (size, digest) in expected.items():
        try:
            with files.open(folder + name) as file:
                data = file.read()
        except FileNotFoundError as error:
            raise ValueError(f"{folder}{name} is missing") from error
        if len(data) != size:
            raise ValueError(f"{folder}{name} has {len(data)} bytes, but its manifest says {size}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{folder}{name} is damaged: its sha256 is not the manifest's")
        read[name] = data
    return read


def _decode(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = decode(data)
    except SafetensorError as error:
        raise ValueError(f"{name} is no safetensors file: {error}") from error
    return tensors


def _copy_weights(model: GPT, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        copy_in(dict(model.named_parameters()), weights)
