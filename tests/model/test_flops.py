"""FLOPs: the formula, against torch's counter and the paper's models."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.flops import forward_flops, training_flops
from model.mae import MAE, MAEConfig

SMALL = MAEConfig(image_size=(64, 64), dim=64, depth=2, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4)
CONFIGS = {
    "small": SMALL,
    "wide": dataclasses.replace(SMALL, image_size=(32, 96), mask_ratio=0.5, mlp_ratio=3.5),
    "B/16": MAEConfig(),
    "H/14": MAEConfig(dim=1280, depth=32, heads=16, patch_size=14),
}


def counted(config: MAEConfig, backward: bool) -> int:
    """The counter on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = MAE(dataclasses.replace(config, attention="math"))
        images, keys = torch.empty(1, 3, *config.image_size, dtype=torch.uint8), torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss = model(images, keys)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_counts_what_torch_counts(name: str) -> None:
    assert forward_flops(CONFIGS[name]) == counted(CONFIGS[name], backward=False)
    assert training_flops(CONFIGS[name]) == counted(CONFIGS[name], backward=True)


@pytest.mark.parametrize(("sizes", "giga"), [({}, 59), ({"dim": 1024, "depth": 24, "heads": 16}, 125)])
def test_training_costs_what_the_reference_s_does_within_two_percent(sizes: dict[str, Any], giga: int) -> None:
    # We are the cheaper one: the reference embeds hidden patches and predicts visible ones.
    assert 0.98 < training_flops(MAEConfig(**sizes)) / (giga * 1e9) <= 1


def test_a_vit_huge_costs_five_times_a_base() -> None:
    assert training_flops(CONFIGS["H/14"]) == pytest.approx(291e9, rel=0.01)
