"""Speeds and memory of this machine, measured, and of accelerators for which a run is planned, from data sheets.

Data sheets list peaks. The share of a peak that a training step reaches is an assumption, one number for matrix
products and one for bandwidths (docs/profiling.md), until `maelstream plan --gpu here` measures it.

torch is imported inside the functions that need it, because `maelstream plan` reads the data sheets without torch.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

MATRIX_SHARE = 0.65
"""Share of the peak rate of matrix products that a training step reaches."""
BANDWIDTH_SHARE = 0.8
"""Share of the peak rate of memory and links that a training step reaches."""

# NVIDIA's own figure for an A100, hardware decoder and CUDA together. Later GPUs get the same until one is measured.
_DECODED_IMAGES_PER_S = 7000
_REPEATS = 3
_MEMORY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far larger than any cache
_SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of square matrices; the faster one counts

# Dense rates in TFLOP/s, from NVIDIA's data sheets, by a part of the name that torch.cuda.get_device_name returns. If a
# sheet lists only the rate "with sparsity", this is half of it. fp32 is the rate of the CUDA cores, because torch
# leaves TF32 off.
DATASHEET: dict[str, dict[str, float]] = {
    # NVIDIA Blackwell architecture technical brief, HGX B200
    "B200": {"bf16": 2250.0},
    # H200 tensor core GPU data sheet; the SXM and the NVL form
    "H200 NVL": {"bf16": 835.5, "fp32": 60.0},
    "H200": {"bf16": 989.4, "fp32": 67.0},
    # H100 tensor core GPU data sheet: SXM, NVL; H100 architecture whitepaper, table 1: PCIe
    "H100 80GB HBM3": {"bf16": 989.4, "fp32": 67.0},
    "H100 NVL": {"bf16": 835.5, "fp32": 60.0},
    "H100 PCIe": {"bf16": 756.0, "fp32": 51.0},
    # A100 tensor core GPU data sheet
    "A100": {"bf16": 312.0, "fp32": 19.5},
    # V100 tensor core GPU data sheet, SXM2: no bf16 (125 in fp16)
    "V100": {"fp32": 15.7},
    # L40S, L4, A10 data sheets
    "L40S": {"bf16": 362.0, "fp32": 91.6},
    "L4": {"bf16": 121.0, "fp32": 30.3},
    "A10": {"bf16": 125.0, "fp32": 31.2},
    # Ada GPU architecture whitepaper, table 2: bf16 with float32 sums
    "RTX 4090": {"bf16": 165.2, "fp32": 82.6},
}


def datasheet_flops_per_s(name: str, precision: Literal["bf16", "fp32"]) -> float | None:
    """Peak dense rate of the GPU `name`; None if it is not known, because a guess would give a wrong MFU."""
    rates = next((rates for part, rates in DATASHEET.items() if re.search(rf"\b{part}\b", name)), {})
    return rates[precision] * 1e12 if precision in rates else None


@dataclass(frozen=True)
class Device:
    """One accelerator, its links to others, and the shares of its peaks that a step reaches."""

    name: str
    flops_per_s: float
    """Dense matrix products, in bf16, or in float32 if `element` is 4."""
    memory_bytes: float
    memory_bytes_per_s: float
    node: int = 8
    """Accelerators per machine."""
    link_bytes_per_s: float | None = None
    """Rate to the others of the machine, one way; None if it is not known."""
    network_bytes_per_s: float | None = None
    """Its share of the machine's network, one way."""
    decode_images_per_s: float | None = None
    """Decoded JPEG crops of ImageNet's size."""
    matrix_share: float = MATRIX_SHARE
    bandwidth_share: float = BANDWIDTH_SHARE
    element: int = 2
    """Bytes per number in the model's arithmetic."""

    def ring_bytes_per_s(self, ranks: int) -> float | None:
        """Bytes per second that one rank sends around a ring of all ranks; None if a rate is not known.

        The ring enters each machine once per network card.
        """
        if self.link_bytes_per_s is None or (ranks > self.node and self.network_bytes_per_s is None):
            return None
        if ranks <= self.node:
            return self.bandwidth_share * self.link_bytes_per_s
        assert self.network_bytes_per_s is not None
        return self.bandwidth_share * min(self.link_bytes_per_s, self.node * self.network_bytes_per_s)


def _from_datasheet(
    name: str, part: str, memory_gb: float, memory_gb_per_s: float, link_gb_per_s: float, network_gb_per_s: float
) -> Device:
    flops_per_s = datasheet_flops_per_s(part, "bf16")
    assert flops_per_s is not None
    return Device(
        name,
        flops_per_s,
        memory_gb * 1e9,
        memory_gb_per_s * 1e9,
        8,
        link_gb_per_s * 1e9,
        network_gb_per_s * 1e9,
        _DECODED_IMAGES_PER_S,
    )


# Memory, its rate and NVLink's rate (half of the sheets' figure, which is for both directions): data sheets of the SXM
# forms. One network card per GPU: DGX B200, H200, H100 (400 Gb/s) and A100 (200 Gb/s) data sheets.
DEVICES = {
    "b200": _from_datasheet("B200", "B200", 180, 8000, 900, 50),
    "h200": _from_datasheet("H200 SXM", "H200", 141, 4800, 450, 50),
    "h100": _from_datasheet("H100 SXM", "H100 80GB HBM3", 80, 3350, 450, 50),
    "a100": _from_datasheet("A100 SXM 80 GB", "A100", 80, 2039, 300, 25),
}


def process_device(local_rank: int | None = None) -> "torch.device":
    """The device that this process computes on: the GPU number `local_rank` (the current one if None), or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda") if local_rank is None else torch.device("cuda", local_rank)


def multiplies_bf16(device: "torch.device") -> bool:
    """Whether `device` multiplies bf16 in hardware: every GPU is assumed to; a CPU needs AVX512_BF16 or AMX.

    A CPU without these instructions multiplies bf16 many times slower than float32.
    """
    import torch

    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def measure_this_machine() -> Device:
    """Measures matrix products and memory in a few seconds; link rates come from the data sheet of this GPU, if any."""
    import torch

    device = process_device()
    cuda, bf16 = device.type == "cuda", multiplies_bf16(device)
    name = torch.cuda.get_device_name() if cuda else f"this CPU, {torch.get_num_threads()} threads"
    sheet = next((each for part, each in DEVICES.items() if part in name.lower()), None) if cuda else None
    memory = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        name,
        matrix_flops_per_s(torch.bfloat16 if bf16 else torch.float32, device),
        memory,
        memory_bytes_per_s(device),
        torch.cuda.device_count() if cuda else 1,
        sheet.link_bytes_per_s if sheet else None,
        sheet.network_bytes_per_s if sheet else None,
        sheet.decode_images_per_s if sheet else None,
        matrix_share=1.0,
        bandwidth_share=1.0,
        element=2 if bf16 else 4,
    )


def matrix_flops_per_s(dtype: "torch.dtype", device: "torch.device") -> float:
    """The best rate of large square matrix products; a multiply-add counts as two operations."""
    import torch

    rates = []
    for side in _SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates.append(2 * side**3 / _best_s(partial(torch.mm, a, b), device))
    return max(rates)


def memory_bytes_per_s(device: "torch.device") -> float:
    """Rate of the device's memory: bytes read and bytes written by a copy."""
    import torch

    source = torch.zeros(_MEMORY_BYTES[device.type], dtype=torch.uint8, device=device)
    return 2 * len(source) / _best_s(partial(torch.empty_like(source).copy_, source), device)


def update_bytes_per_s(device: "torch.device") -> float:
    """Rate of the device's memory for updates in place, as an optimizer does: bytes read and bytes written.

    On a CPU it is higher than `memory_bytes_per_s`: a copy also reads the cache lines that it overwrites.
    """
    import torch

    numbers = torch.zeros(_MEMORY_BYTES[device.type] // 4, device=device)
    return 2 * numbers.nbytes / _best_s(partial(numbers.add_, 1.0), device)


def copy_bytes_per_s(device: "torch.device") -> float:
    """Rate of copies from pinned memory to a GPU."""
    import torch

    source = torch.zeros(2**28, dtype=torch.uint8).pin_memory()
    return len(source) / _best_s(partial(torch.empty_like(source, device=device).copy_, source), device)


def free_bytes(device: "torch.device") -> int:
    """Memory that can be allocated now."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def synchronise(device: "torch.device") -> None:
    """Waits until `device` has finished its queued work; a CPU has no queue."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_s(run: Callable[[], object], device: "torch.device") -> float:
    times = []
    for _ in range(1 + _REPEATS):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
