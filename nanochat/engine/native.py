"""The CPU's own runner: the whole forward pass in one call of C++ that is compiled on the machine it runs on.

Compiling takes seconds, once for each machine and version of the sources; the library is kept in the user's own folder.
A row's logits have the same bits whatever else is in the batch and however many threads there are. Knows no requests.
"""

# T tokens, N sequences, R wanted rows, V vocabulary

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.engine.quantize import quantize
from nanochat.engine.runner import BLOCK, Batch, Precision
from nanochat.model import rotary_table, weight_shapes

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno")
BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "int8": 8}
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.fc1", "mlp.fc2")
HEAD, EMBEDDING = 6, 7  # parts after those of a layer
FAULTS = {1: "tokens", 2: "counts", 3: "past", 4: "tables", 5: "wanted"}
DIGEST = 64  # characters at a library's end: SHA-256 of what is before them


class NoCompilerError(RuntimeError):
    """The kernel cannot be built or kept on this machine; the message says why and what helps."""


@dataclass(frozen=True, slots=True)
class Build:
    """Where the compiled kernel is kept, and how it is compiled.

    folder: made if missing; must be the user's own and closed to others, since what lies there is run.
    compilers: names or paths, the first that exists is taken.
    """

    folder: Path = Path("~/.cache/nanochat/native")
    compilers: tuple[str, ...] = COMPILERS
    flags: tuple[str, ...] = FLAGS


DEFAULT = Build()


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
    """The kernel for a precision: from the folder if it lies there whole, else built and put there.

    Raises NoCompilerError.
    """
    folder = _own_folder(build.folder.expanduser())
    compiler = next((found for name in build.compilers if (found := shutil.which(name))), None)
    if compiler is None:
        raise NoCompilerError(
            f"no C++ compiler: none of {', '.join(build.compilers)} is on the PATH; install one (apt install g++)"
        )
    flags = (*build.flags, f"-DNANOCHAT_PRECISION={precision.capitalize()}")
    path = folder / f"{_key(compiler, flags)}.so"
    if not _whole(path):
        _compile(compiler, flags, path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompilerError(f"the kernel compiled by {compiler} cannot be loaded: {error}") from error
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


def _own_folder(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        raise NoCompilerError(f"the kernel's folder {folder} cannot be made: {error}; name another") from error
    if state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise NoCompilerError(
            f"the kernel's folder {folder} is open to others or belongs to user {state.st_uid}; what lies there is "
            f"run, so make it yours alone (chmod 700) or name another"
        )
    return folder


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Names everything that the compiled code depends on."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(f"{source.name} {source.stat().st_size}\n".encode() + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest.update("\n".join((compiler, version, *flags, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Model and abilities, since the code is compiled for just this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def _whole(path: Path) -> bool:
    """Whether the library is as it was written: a damaged one would end the process when it is loaded or run."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return data[-DIGEST:] == hashlib.sha256(data[:-DIGEST]).hexdigest().encode()


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Builds beside `path` and moves it there whole: two processes that do so at once do not disturb each other."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / "step.so"
        command = [compiler, *flags, "-Wno-psabi", str(SOURCES / "step.cpp"), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not built.exists():
            raise NoCompilerError(
                f"`{' '.join(command)}` ended with {done.returncode}; a compiler for C++20 is needed "
                f"(g++ 11 or clang++ 14 or newer). It said: {done.stderr.strip()[-2000:]}"
            )
        data = built.read_bytes()
        built.write_bytes(data + hashlib.sha256(data).hexdigest().encode())
        built.replace(path)
