"""What this machine can do at most: matrix products, memory, copies to the device; measured, and from data sheets."""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

_REPEATS = 3
_MEMORY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far over any cache
_SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of square matrices; the faster counts

# Dense rates in TFLOP/s, from NVIDIA's data sheets, by a part of the name that torch.cuda.get_device_name gives. Where
# a sheet tells the rate "with sparsity" alone, half of it. float32 is that of the CUDA cores: torch leaves TF32 off.
DATASHEET: dict[str, dict[torch.dtype, float]] = {
    # NVIDIA Blackwell architecture technical brief, HGX B200
    "B200": {torch.bfloat16: 2250.0},
    # H200 tensor core GPU data sheet; the SXM and the NVL form
    "H200 NVL": {torch.bfloat16: 835.5, torch.float32: 60.0},
    "H200": {torch.bfloat16: 989.4, torch.float32: 67.0},
    # H100 tensor core GPU data sheet: SXM, NVL; H100 architecture whitepaper, table 1: PCIe
    "H100 80GB HBM3": {torch.bfloat16: 989.4, torch.float32: 67.0},
    "H100 NVL": {torch.bfloat16: 835.5, torch.float32: 60.0},
    "H100 PCIe": {torch.bfloat16: 756.0, torch.float32: 51.0},
    # A100 tensor core GPU data sheet
    "A100": {torch.bfloat16: 312.0, torch.float32: 19.5},
    # V100 tensor core GPU data sheet, SXM2: no bf16 (125 in fp16)
    "V100": {torch.float32: 15.7},
    # L40S, L4, A10 data sheets
    "L40S": {torch.bfloat16: 362.0, torch.float32: 91.6},
    "L4": {torch.bfloat16: 121.0, torch.float32: 30.3},
    "A10": {torch.bfloat16: 125.0, torch.float32: 31.2},
    # Ada GPU architecture whitepaper, table 2: bf16 with float32 sums
    "RTX 4090": {torch.bfloat16: 165.2, torch.float32: 82.6},
}


def datasheet_flops_per_s(name: str, dtype: torch.dtype) -> float | None:
    """Of the GPU `name`; None where it is not known, rather than guessed."""
    rates = next((rates for part, rates in DATASHEET.items() if re.search(rf"\b{part}\b", name)), {})
    return rates[dtype] * 1e12 if dtype in rates else None


def matrix_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate of large square products, a multiply-add as two."""
    rates = []
    for side in _SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates.append(2 * side**3 / _best_s(partial(torch.mm, a, b), device))
    return max(rates)


def memory_bytes_per_s(device: torch.device) -> float:
    """Of the device's memory: bytes read and written by a copy."""
    source = torch.zeros(_MEMORY_BYTES[device.type], dtype=torch.uint8, device=device)
    return 2 * len(source) / _best_s(partial(torch.empty_like(source).copy_, source), device)


def copy_bytes_per_s(device: torch.device) -> float:
    """From pinned memory to a GPU."""
    source = torch.zeros(2**28, dtype=torch.uint8).pin_memory()
    return len(source) / _best_s(partial(torch.empty_like(source, device=device).copy_, source), device)


def free_bytes(device: torch.device) -> int:
    """Of memory that can be had now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def synchronise(device: torch.device) -> None:
    """Waits for what `device` has been given to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_s(run: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    for _ in range(1 + _REPEATS):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
