"""Weight-decay groups and the learning rate, against the reference's."""

import json
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from model.mae import MAE, MAEConfig
from model.optimise import lr_at, weight_decay_groups

Golden = Callable[[str], Mapping[str, np.ndarray]]

SMALL = MAEConfig(image_size=(64, 64), dim=64, depth=2, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4)


def names_of(model: torch.nn.Module, groups: list[dict]) -> list[list]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[group["weight_decay"], sorted(names[parameter] for parameter in group["params"])] for group in groups]


def test_groups_are_the_reference_s(golden: Golden) -> None:
    model = MAE(SMALL)
    expected = json.loads(str(golden("f64/mae_small")["wd_groups_json"]))
    assert names_of(model, weight_decay_groups(model, 0.05)) == [[decay, sorted(names)] for decay, names in expected]


def test_groups_of_vit_base_have_the_reference_s_sizes(golden: Golden) -> None:
    with torch.device("meta"):
        model = MAE(MAEConfig())
    groups = weight_decay_groups(model, 0.05)
    for group, expected in zip(groups, json.loads(str(golden("f64/optim")["wd_split_base_json"])), strict=True):
        assert group["weight_decay"] == expected["weight_decay"]
        assert len(group["params"]) == expected["n"]
        assert sum(parameter.numel() for parameter in group["params"]) == expected["numel"]


def test_tokens_decay_and_biases_do_not() -> None:
    model = MAE(SMALL)
    (_, still), (decay, decayed) = names_of(model, weight_decay_groups(model, 0.3))
    assert decay == 0.3
    assert {"cls_token", "mask_token"} <= set(decayed)
    assert {"norm.weight", "patch_embed.proj.bias"} <= set(still)


def test_frozen_parameters_are_left_out() -> None:
    model = MAE(SMALL)
    model.blocks.requires_grad_(False)
    names = [name for _, group in names_of(model, weight_decay_groups(model, 0.05)) for name in group]
    assert "norm.weight" in names
    assert not any(name.startswith("blocks.") for name in names)


@pytest.mark.parametrize("schedule", ["pretrain", "finetune_base", "finetune_large", "linprobe"])
def test_learning_rates_are_the_reference_s_at_every_iteration(golden: Golden, schedule: str) -> None:
    vectors = golden("f64/optim")
    args = json.loads(str(vectors[f"lr_{schedule}_args"]))
    options = {
        "peak": args["lr"],
        "floor": args["min_lr"],
        "warmup_steps": args["warmup_epochs"] * args["ipe"],
        "total_steps": args["epochs"] * args["ipe"],
    }
    rates = [lr_at(int(step), **options) for step in vectors[f"lr_{schedule}_it"]]
    # The last steps are a difference of nearly equal numbers, hence the share of the peak.
    np.testing.assert_allclose(rates, vectors[f"lr_{schedule}"], rtol=1e-12, atol=1e-15 * args["lr"])


def test_learning_rates_are_the_reference_s_at_fractional_epochs(golden: Golden) -> None:
    vectors = golden("optim")
    args = json.loads(str(vectors["lr_args"]))
    options = {
        "peak": args["lr"],
        "floor": args["min_lr"],
        "warmup_steps": args["warmup_epochs"] * 1000,
        "total_steps": args["epochs"] * 1000,
    }
    rates = [lr_at(round(epoch * 1000), **options) for epoch in vectors["lr_epochs"]]
    np.testing.assert_allclose(rates, vectors["lr_values"], rtol=1e-9, atol=1e-15 * args["lr"])


def test_a_schedule_without_warm_up_starts_at_its_peak() -> None:
    assert lr_at(0, peak=1.0, floor=0.1, warmup_steps=0, total_steps=10) == 1.0
    assert lr_at(5, peak=1.0, floor=0.1, warmup_steps=0, total_steps=10) == pytest.approx(0.55)
    assert lr_at(10, peak=1.0, floor=0.1, warmup_steps=0, total_steps=10) == pytest.approx(0.1)
