"""The roofline of a step counts every operator once, and ViT-H's bound does not get worse."""

import pytest
import torch

from benchmarks.roofline import H100, Roofline, bound, step_roofline
from maelstream.model.config import MAEConfig
from maelstream.model.sizes import PAPER_SIZES

H14_BOUND = 0.635
"""Bound of the eager step at a micro-batch of 128 (docs/measured/roofline.md)."""


def test_the_bound_of_vit_h14_is_not_below_the_stored_one() -> None:
    config = MAEConfig(**PAPER_SIZES["vit_h14"]._asdict(), attention="sdpa")
    assert bound(config, 128, step_roofline(config, 128)) > H14_BOUND - 0.002


def test_products_take_their_flops_and_sums_their_bytes_and_views_nothing() -> None:
    left, right = torch.ones(4096, 4096, dtype=torch.bfloat16), torch.ones(4096, 4096, dtype=torch.bfloat16)
    with torch.device("meta"), Roofline() as roofline:
        product = left.to("meta") @ right.to("meta")
    copies = 2 * 2 * 4096**2 * 2 / H100.memory_bytes_per_s  # two copies, each reads and writes
    assert roofline.seconds == pytest.approx(copies + 2 * 4096**3 / H100.flops_per_s)
    with Roofline() as roofline:
        product.view(-1).reshape(64, -1).T[3]
    assert roofline.seconds == roofline.kernels == 0
    with Roofline() as roofline:
        product + product
    assert (
        roofline.seconds == pytest.approx(3 * 4096**2 * 2 / H100.memory_bytes_per_s) and roofline.product_seconds == 0
    )
