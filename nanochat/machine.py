"""What a machine can do at best, and how much of it a process took."""

import re
import resource
import sys
import time
from pathlib import Path

import torch

# Products of dense bf16 matrices, of a whole GPU, by words of its name. From https://www.nvidia.com/data-center, whose
# pages print them with sparsity, which is twice as much; torchtitan/tools/utils.py has the same.
PEAK_FLOPS_PER_S = {
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
MEASURE_S = 0.2  # for as long a product is tried again


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """What the share that a training uses (MFU) is a share of: the maker's figure of a GPU for bf16, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        stated = stated_flops_per_s(torch.cuda.get_device_name(device))
        if stated is not None:
            return stated
    return measured_flops_per_s(device, dtype)


def stated_flops_per_s(gpu: str) -> float | None:
    """The maker's figure, by what torch calls the GPU ("NVIDIA H100 80GB HBM3"); None if the table has none."""
    words = set(re.split(r"[ -]", gpu))
    named = [name for name in PEAK_FLOPS_PER_S if words.issuperset(name.split())]
    return PEAK_FLOPS_PER_S[max(named, key=len)] if named and "MIG" not in words else None


def measured_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The best that a product of square matrices reaches here, in fp32 by the way that torch takes by itself."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_bf16():
        dtype = torch.float32  # as nanochat/products.py does
    size = 8192 if device.type == "cuda" else 1024  # on two cores larger ones are no faster
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    best, began = 0.0, time.perf_counter()
    for run in range(1000):
        if run >= 3 and time.perf_counter() - began > MEASURE_S:
            break
        tried = time.perf_counter()
        float((a @ b)[0, 0])  # waits for a GPU
        best = max(best, 2 * size**3 / (time.perf_counter() - tried))
    return best


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; where it does not, torch's bf16 is slower than its fp32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of a GPU what torch handed out, else what this process had since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_peak_bytes()


def process_peak_bytes() -> int:
    """The most memory that this process had since it began.

    Linux's VmHWM: getrusage's number begins with the parent's, and a benchmark's processes have a large one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    if peaks:
        return int(peaks[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
