"""Accelerators that a run can be planned for: from NVIDIA's data sheets, or this machine as it is measured.

Sheets tell peaks. What of them a training step gets is an assumption, one number for products and one for bandwidths
(docs/profiling.md), until `--gpu here` measures it.
"""

import os
from dataclasses import dataclass

import torch

from maelstream.jobs.hardware import datasheet_flops_per_s, matrix_flops_per_s, memory_bytes_per_s

MATRIX_SHARE = 0.65
BANDWIDTH_SHARE = 0.8


@dataclass(frozen=True)
class Device:
    """One accelerator, its place in a machine, and what of its peaks can be had."""

    name: str
    flops_per_s: float
    """Dense products, in bf16, or in float32 where `element` is 4."""
    memory_bytes: float
    memory_bytes_per_s: float
    node: int = 8
    """Accelerators of a machine."""
    link_bytes_per_s: float | None = None
    """To the others of the machine, one way; None where it is not known."""
    network_bytes_per_s: float | None = None
    """Its share of the machine's network, one way."""
    decode_images_per_s: float | None = None
    """JPEGs, windows of ImageNet's size."""
    matrix_share: float = MATRIX_SHARE
    bandwidth_share: float = BANDWIDTH_SHARE
    element: int = 2
    """Bytes of a number in the model's arithmetic."""

    def ring_bytes_per_s(self, ranks: int) -> float | None:
        """What one rank sends around a ring of all; a ring enters each machine once for each network card."""
        if self.link_bytes_per_s is None or (ranks > self.node and self.network_bytes_per_s is None):
            return None
        if ranks <= self.node:
            return self.bandwidth_share * self.link_bytes_per_s
        assert self.network_bytes_per_s is not None
        return self.bandwidth_share * min(self.link_bytes_per_s, self.node * self.network_bytes_per_s)


def _sheet(name: str, part: str, *figures: float) -> Device:
    memory_gb, memory_gb_per_s, link_gb_per_s, network_gb_per_s, decode = figures
    flops_per_s = datasheet_flops_per_s(part, torch.bfloat16)
    assert flops_per_s is not None
    return Device(
        name,
        flops_per_s,
        memory_gb * 1e9,
        memory_gb_per_s * 1e9,
        8,
        link_gb_per_s * 1e9,
        network_gb_per_s * 1e9,
        decode,
    )


# Memory, its rate and NVLink's (half of what the sheets give for both ways): data sheets of the SXM forms. A network
# card for each GPU: DGX B200, H200, H100 (400 Gb/s) and A100 (200 Gb/s) data sheets. Decoded images/s: 7,000 on an
# A100 (NVIDIA's own figure, hardware and CUDA together); later ones get the same until one has been measured.
DEVICES = {
    "b200": _sheet("B200", "B200", 180, 8000, 900, 50, 7000),
    "h200": _sheet("H200 SXM", "H200", 141, 4800, 450, 50, 7000),
    "h100": _sheet("H100 SXM", "H100 80GB HBM3", 80, 3350, 450, 50, 7000),
    "a100": _sheet("A100 SXM 80 GB", "A100", 80, 2039, 300, 25, 7000),
}


def this_machine() -> Device:
    """Measured in a few seconds: products and memory. Links are those of the sheet that fits the GPU's name, if any."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    bf16 = cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()
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
