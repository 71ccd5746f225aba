"""The CPU's own runner: the whole forward pass in one call of C++ that is compiled on the machine it runs on.

A row's logits have the same bits whatever else is in the batch and however many threads there are. Knows no requests.
"""

# T tokens, N sequences, R wanted rows, V vocabulary

import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.cpp import FLAGS, Build, load
from nanochat.engine.quantize import quantize
from nanochat.engine.runner import BLOCK, Batch, Precision
from nanochat.model import rotary_table, weight_shapes

SOURCES = Path(__file__).parent / "native"
BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "int8": 8}
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.fc1", "mlp.fc2")
HEAD, EMBEDDING = 6, 7  # parts after those of a layer
FAULTS = {1: "tokens", 2: "counts", 3: "past", 4: "tables", 5: "wanted"}


DEFAULT = Build(flags=(*FLAGS, "-pthread"))


class NativeRunner:
    """Runner (nanochat/engine/runner.py) in C++. One call at a time.

    threads: of a step, the caller's among them; they sleep between steps.  Raises NoCompilerError.
    """

    deterministic = True

    def __init__(  # noqa: PLR0913 (the runners' common face, and the build)
        self,
        config: ModelConfig,
        vocab_size: int,
        weights: Mapping[str, Tensor],
        *,
        precision: Precision,
        blocks: int,
        threads: int,
        build: Build = DEFAULT,
    ) -> None:
        assert min(blocks, threads, vocab_size) > 0, f"{blocks} blocks, {threads} threads, {vocab_size} tokens"
        self.config, self.vocab_size, self.precision, self.blocks = config, vocab_size, precision, blocks
        self._library = library(build, precision)
        heads, kv_heads, head_dim = config.heads, config.key_heads, config.head_dim
        sizes = np.array(
            [config.depth, config.width, heads, kv_heads, head_dim, vocab_size, config.context, blocks, threads],
            np.int32,
        )
        self._angles = tuple(table.flatten(1).contiguous() for table in rotary_table(config.context, head_dim))
        handle = self._library.nanochat_make(sizes.ctypes.data, *(table.data_ptr() for table in self._angles))
        if not handle:
            raise MemoryError(f"no memory for {blocks} blocks of {BLOCK} tokens; ask for a smaller cache")
        self._model = ctypes.c_void_p(handle)
        self._drop = weakref.finalize(self, self._library.nanochat_drop, self._model)
        self._logits = torch.empty(0, vocab_size)
        self._sizes = (ctypes.c_int32 * 4)()
        self._fields = (ctypes.c_void_p * 5)()
        matrices = config.depth * config.width * (2 * heads + 2 * kv_heads) * head_dim
        matrices += config.depth * 8 * config.width**2 + config.width * vocab_size
        outputs = config.depth * ((heads + 2 * kv_heads) * head_dim + 6 * config.width) + vocab_size
        self.weight_bytes = matrices * BITS[precision] // 8 + (outputs * 4 if precision == "int8" else 0)
        width_in_cache = head_dim + -(-head_dim // 32) * 32  # values are padded to vectors
        self.block_bytes = config.depth * kv_heads * BLOCK * width_in_cache * (4 if precision == "fp32" else 2)
        self._load(weights)

    def forward(self, batch: Batch) -> Tensor:
        wanted = len(batch.wanted)
        if len(self._logits) < wanted:
            self._logits = torch.empty(wanted, self.vocab_size)
        fields = (batch.tokens, batch.counts, batch.past, batch.tables, batch.wanted)
        for i, field in enumerate(fields):
            assert field.dtype == np.int32, f"a batch is of int32, not {field.dtype}"
            assert field.flags.c_contiguous, "the arrays of a batch lie in one piece each"
            self._fields[i] = field.ctypes.data
        sequences = len(batch.counts)
        assert len(batch.past) == len(batch.tables) == sequences, "counts, past and tables are of the same sequences"
        self._sizes[:] = [len(batch.tokens), sequences, batch.tables.shape[1], wanted]
        fault = self._library.nanochat_forward(self._model, self._fields, self._sizes, self._logits.data_ptr())
        if fault == -1:
            raise MemoryError(f"no memory for a step of {len(batch.tokens)} tokens; use fewer tokens a step")
        assert fault == 0, f"the batch's {FAULTS[fault]} are out of range or do not fit the others: {batch}"
        return self._logits[:wanted]

    def copy(self, source: int, target: int) -> None:
        assert min(source, target) >= 0, f"block {min(source, target)}"
        assert max(source, target) < self.blocks, f"block {max(source, target)} of {self.blocks}"
        self._library.nanochat_copy(self._model, source, target)

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        shapes = weight_shapes(self.config, self.vocab_size)

        def weight(name: str) -> Tensor:
            found = weights[name].detach()
            assert found.shape == shapes[name], f"{name} is {tuple(found.shape)}, not {shapes[name]}"  # C++ trusts it
            return found

        stored = torch.float32 if self.precision == "fp32" else torch.bfloat16
        # copy: the caller may go on to train its own
        self._embedding = weight("model.embed_tokens.weight").to("cpu", stored, copy=True).contiguous()
        self._library.nanochat_load(self._model, 0, EMBEDDING, self._embedding.data_ptr(), None)
        for layer in range(self.config.depth):
            for part, name in enumerate(PARTS):
                self._pack(layer, part, weight(f"model.layers.{layer}.{name}.weight"))
        self._pack(0, HEAD, weight("lm_head.weight"))

    def _pack(self, layer: int, part: int, weight: Tensor) -> None:
        weight, scales = weight.cpu(), None
        if self.precision == "int8":
            weight, scales = quantize(weight)
        else:
            weight = weight.to(torch.float32 if self.precision == "fp32" else torch.bfloat16)
        weight = weight.contiguous()
        pointer = scales.data_ptr() if scales is not None else None
        self._library.nanochat_load(self._model, layer, part, weight.data_ptr(), pointer)


def read_bandwidth(threads: int, size: int = 1 << 30, build: Build = DEFAULT) -> float:
    """Bytes per second that `threads` threads read from memory: the best of three kernels over `size` bytes."""
    return float(library(build).nanochat_read_bandwidth(threads, size))


def library(build: Build = DEFAULT, precision: Precision = "bf16") -> ctypes.CDLL:
    """The kernel for a precision. Raises NoCompilerError."""
    headers = sorted(SOURCES.glob("*.h"))
    flags = (*build.flags, f"-DNANOCHAT_PRECISION={precision.capitalize()}")
    loaded = load(SOURCES / "step.cpp", headers, replace(build, flags=flags))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    loaded.nanochat_make.restype, loaded.nanochat_make.argtypes = pointer, [pointer] * 3
    loaded.nanochat_drop.restype, loaded.nanochat_drop.argtypes = None, [pointer]
    loaded.nanochat_load.restype = ctypes.c_bool
    loaded.nanochat_load.argtypes = [pointer, integer, integer, pointer, pointer]
    loaded.nanochat_forward.restype, loaded.nanochat_forward.argtypes = integer, [pointer] * 4
    loaded.nanochat_copy.restype, loaded.nanochat_copy.argtypes = None, [pointer, integer, integer]
    loaded.nanochat_read_bandwidth.restype = ctypes.c_double
    loaded.nanochat_read_bandwidth.argtypes = [integer, ctypes.c_int64]
    return loaded
