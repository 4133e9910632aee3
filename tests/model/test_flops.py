"""FLOPs: the formula against torch's counter, the paper and the reference implementation."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maelstream.model.config import MAEConfig
from maelstream.model.flops import backward_by_part, forward_by_part, forward_flops, training_flops
from maelstream.model.mae import MAE

SMALL = MAEConfig(image_size=(64, 64), dim=64, depth=2, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4)
CONFIGS = {
    "small": SMALL,
    "wide": dataclasses.replace(SMALL, image_size=(32, 96), mask_ratio=0.5, mlp_ratio=3.5),
    "encoder mask tokens": dataclasses.replace(SMALL, encoder_mask_tokens=True),
    "one decoder block": dataclasses.replace(SMALL, decoder_depth=1, decoder_dim=128),
    "grid": dataclasses.replace(SMALL, mask="grid"),
    "B/16": MAEConfig(),
    "L/16 with mask tokens": MAEConfig(dim=1024, depth=24, heads=16, encoder_mask_tokens=True),
    "H/14": MAEConfig(dim=1280, depth=32, heads=16, patch_size=14),
    "H/14 at 448 px": MAEConfig(image_size=(448, 448), dim=1280, depth=32, heads=16, patch_size=14),
}


def part(module: str) -> str:
    """The part of the model to which a module belongs; the counter names modules by class and path."""
    name = module.removeprefix("MAE.").split(".")[0]
    return {"decoder_pred": "head"}.get(name, "decoder" if name.startswith("decoder") else "encoder")


def counted(config: MAEConfig) -> tuple[dict[str, int], int]:
    """Forward FLOPs by part, and FLOPs of forward and backward, from torch's counter on the meta device."""
    with torch.device("meta"):
        model = MAE(dataclasses.replace(config, attention="math"))
        images, keys = torch.empty(1, 3, *config.image_size, dtype=torch.uint8), torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss = model(images, keys)
    forward = {"encoder": 0, "decoder": 0, "head": 0}
    for module, flops in counter.get_flop_counts().items():
        if module.count(".") == 1:
            forward[part(module)] += sum(flops.values())
    assert sum(forward.values()) == counter.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward, counter.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_equals_the_counter_of_torch(name: str) -> None:
    forward, training = counted(CONFIGS[name])
    assert forward_by_part(CONFIGS[name])._asdict() == forward
    assert forward_flops(CONFIGS[name]) == sum(forward.values())
    assert training_flops(CONFIGS[name]) == training
    assert sum(backward_by_part(CONFIGS[name])) == training - sum(forward.values())


def test_an_encoder_with_mask_tokens_costs_3_3_times_as_in_the_paper() -> None:
    """Table 1c: 3.3 times the FLOPs of an encoder without mask tokens."""
    large = MAEConfig(dim=1024, depth=24, heads=16)
    assert training_flops(CONFIGS["L/16 with mask tokens"]) / training_flops(large) == pytest.approx(3.3, abs=0.1)


@pytest.mark.parametrize(("sizes", "giga"), [({}, 59), ({"dim": 1024, "depth": 24, "heads": 16}, 125)])
def test_training_costs_up_to_two_percent_less_than_the_reference(sizes: dict[str, Any], giga: int) -> None:
    # The reference costs more, because it also embeds removed patches and predicts visible ones.
    assert 0.98 < training_flops(MAEConfig(**sizes)) / (giga * 1e9) <= 1


def test_vit_huge_costs_291_gflops_per_image() -> None:
    assert training_flops(CONFIGS["H/14"]) == pytest.approx(291e9, rel=0.01)
