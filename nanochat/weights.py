"""A model's weights as they lie in a safetensors file, each read when it is asked for.

Loading them one at a time, an engine never holds a model twice: neither two copies of it nor two precisions.
Format: eight bytes of length, a JSON header, then the numbers (https://huggingface.co/docs/safetensors).
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class StoredWeights(Mapping[str, Tensor]):
    """Tensors by name. `shapes` is known without reading any. ValueError if it is no safetensors file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        try:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
            self._begin = 8 + size
            self._entries = {name: self._entry(entry) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no safetensors file: {error!r:.200}") from error
        self.shapes = {name: shape for name, (_, shape, _) in self._entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, begin = self._entries[name]
        self._file.seek(self._begin + begin)
        weight = torch.empty(shape, dtype=dtype)
        if self._file.readinto(weight.view(-1).view(torch.uint8).numpy()) != weight.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"{name}: the file ends before its {weight.nbytes} bytes do")
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @staticmethod
    def _entry(entry: Any) -> tuple[torch.dtype, tuple[int, ...], int]:
        """dtype, shape and first byte of a tensor; the header must agree with itself."""
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize or min((begin, *shape)) < 0:
            raise ValueError(f"{shape} of {dtype} in bytes {begin} to {end}")
        return dtype, shape, begin
