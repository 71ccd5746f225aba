"""Weights and training state as files: safetensors and JSON, never pickle.

A model folder is what transformers loads: config.json and model.safetensors.
A checkpoint lies in step-00000100/ and counts from the moment its manifest.json, written last, is there. Ranks that
hold a part of the optimizer's state each write their own; any number of ranks reads what any other number wrote.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
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
from nanochat.optim import Optimizer, check_shapes, copy_in, merged
from nanochat.weights import StoredWeights

MODEL: Final = "model.safetensors"
STATE: Final = "state.json"
MANIFEST: Final = "manifest.json"
CONFIG: Final = "config.json"
KEEP: Final = 2  # checkpoints: one may be damaged
PATIENCE_S: Final = 600.0  # with which rank 0 waits for the parts of the others
LOOK_S: Final = 0.1  # between two looks for them


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


class Saver:
    """Saves a training while it goes on: `save` copies its state to host memory, and a thread writes the copy.

    At most one is being written. Every rank makes one and calls `save` at the same steps.
    """

    def __init__(
        self,
        files: Files,
        model: GPT,
        optimizer: Optimizer,
        *,
        rank: int = 0,
        parts: int = 1,
        committed: Callable[[int], None] = lambda step: None,
    ) -> None:
        """parts: of the optimizer's state, one on each rank; 1: rank 0 has all of it, and writes alone.

        committed: called by the thread of rank 0 with a step that is now sure to be found again.
        """
        self._files, self._model, self._optimizer = files, model, optimizer
        self._rank, self._parts, self._committed = rank, parts, committed
        self._host: dict[str, Tensor] = {}  # kept, since fresh memory costs more than the copy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether one is being written. Raises what went wrong with it if it ended otherwise."""
        if self._writing is not None and self._writing.done():
            self.wait()
        return self._writing is not None

    def wait(self) -> None:
        """Return when nothing is being written; raises what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def save(self, step: int, extra: dict[str, Any]) -> None:
        """Begin the checkpoint of `step` done steps, after the one that may be in flight; extra: JSON data.

        Only the copy is made before this returns. The caller leaves `extra` as it is.
        """
        self.wait()
        if self._rank >= self._parts:
            return
        weights = {} if self._rank else {name: w.detach() for name, w in self._model.named_parameters()}
        state = self._optimizer.state_dict()
        copied = _to_host({f"weight {name}": w for name, w in weights.items()} | state, self._host)
        model = {name: copied.pop(f"weight {name}") for name in weights}
        self._writing = self._thread.submit(self._write, step, model, copied, extra)

    def _write(self, step: int, model: dict[str, Tensor], state: dict[str, Tensor], extra: dict[str, Any]) -> None:
        files, folder = self._files, _folder(step)
        part = files.put(folder + _optim_files(self._parts)[self._rank], encode(state))
        if self._rank:
            files.put(_receipt(step, self._rank), json.dumps(asdict(part)).encode())
            return
        written = [
            part,
            files.put(folder + MODEL, encode(model)),
            files.put(folder + STATE, json.dumps({"step": step, "extra": extra}).encode()),
            *(self._part_of(step, rank) for rank in range(1, self._parts)),
        ]
        for rank in range(1, self._parts):
            files.delete(_receipt(step, rank))
        manifest = {file.path.removeprefix(folder): {"bytes": file.bytes, "sha256": file.sha256} for file in written}
        files.put(folder + MANIFEST, json.dumps(manifest, indent=2).encode())
        self._committed(step)
        prune(files)

    def _part_of(self, step: int, rank: int) -> File:
        """What another rank says to have written."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self._files.open(_receipt(step, rank)) as told:
                    return File(**json.load(told))
            except FileNotFoundError:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"rank {rank} has not written its part of {_folder(step)} within {PATIENCE_S:.0f} s"
                    ) from None
            time.sleep(LOOK_S)


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
    _copy_weights(model, _decode(_folder(step) + MODEL, read.pop(MODEL)))
    extra: dict[str, Any] = json.loads(read.pop(STATE))["extra"]
    optimizer.load_state_dict(merged(_decode(_folder(step) + name, data) for name, data in read.items()))
    return extra


def prune(files: Files, keep: int = KEEP) -> None:
    """Delete all but the newest `keep` checkpoints, and whatever was never committed. Not while another one saves."""
    kept = _committed(files)[-keep:] if keep else []
    for step in _steps(files):
        if step not in kept:
            _delete(files, step)


def collect(files: Files, start: int) -> None:
    """Delete what a run that goes on from `start` (0: the beginning) must not meet again: all of later steps, which
    is damaged or was given up, and whatever was never committed. Before any rank saves.
    """
    for step in _steps(files):
        if step > start:
            _delete(files, step)
    prune(files)


def _to_host(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, in `buffers` of the same names, which are made where they are not there yet."""
    for name, tensor in tensors.items():
        if name not in buffers:
            buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffers[name].copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return {name: buffers[name] for name in tensors}


def _folder(step: int) -> str:
    return f"step-{step:08d}/"


def _optim_files(parts: int) -> list[str]:
    """The files of the optimizer's state, by rank."""
    if parts == 1:
        return ["optim.safetensors"]
    return [f"optim-{rank:05d}-of-{parts:05d}.safetensors" for rank in range(parts)]


def _receipt(step: int, rank: int) -> str:
    """By which a rank tells rank 0 that its part is written: a file that goes before the manifest comes."""
    return f"{_folder(step)}rank-{rank}.json"


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
        names = [MODEL, STATE, *_optim_files(len(manifest) - 2)]
        expected = {name: (manifest[name]["bytes"], manifest[name]["sha256"]) for name in names}
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
