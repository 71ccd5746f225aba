"""nanochat/native/train.cpp for tensors: what a bf16 training step on a CPU does between its matrix products.

Each function goes over its tensors once; train.cpp says what each does and in which layout. Nothing here allocates.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from nanochat.cpp import Build, load

SOURCE = Path(__file__).parent / "native" / "train.cpp"
HEADERS = tuple(Path(__file__).parent / "engine" / "native" / name for name in ("lanes.h", "simd.h"))
LANES = 16  # numbers that the code takes at a time
DEFAULT = Build(compilers=("g++", "c++"))

Number = int | float
Argument = Tensor | Number | None


class Kernels:
    """The compiled functions; `threads`: of each call. Raises NoCompilerError."""

    def __init__(self, threads: int, build: Build = DEFAULT) -> None:
        self.threads = threads
        self._library = load(SOURCE, HEADERS, build, openmp=True)

    def __call__(self, name: str, *arguments: Argument, sizes: tuple[int, ...] | None = None) -> None:
        """Call nanochat_<name>. The threads come last: in the array of the sizes, where it takes one."""
        values = [_plain(argument) for argument in arguments]
        if sizes is None:
            values.append(ctypes.c_int(self.threads))
        else:
            values.append((ctypes.c_int32 * (len(sizes) + 1))(*sizes, self.threads))
        getattr(self._library, f"nanochat_{name}")(*values)


def _plain(argument: Argument) -> object:
    """A tensor's address; whole numbers are int64 in the registers, which an int takes the lower half of."""
    if isinstance(argument, Tensor):
        assert argument.is_contiguous(), "the tensors of a kernel lie in one piece each"
        assert argument.device.type == "cpu", "a kernel is for the CPU's memory"
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return None if argument is None else ctypes.c_int64(argument)


def able(width: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels can do a model of these sizes."""
    return dtype == torch.bfloat16 and width % LANES == 0 and head_dim % (2 * LANES) == 0
