"""Parameter groups, learning rates and LARS equal the reference."""

import copy
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from maelstream.model.classifier import build_classifier
from maelstream.model.config import ClassifierConfig, MAEConfig
from maelstream.model.mae import MAE
from maelstream.model.optimise import LARS, Span, layer_decay_groups, lr_at, weight_decay_groups

Golden = Callable[[str], Mapping[str, np.ndarray]]

SMALL = MAEConfig(image_size=(64, 64), dim=64, depth=2, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4)


def names_of(model: torch.nn.Module, groups: list[dict]) -> list[list]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[group["weight_decay"], sorted(names[parameter] for parameter in group["params"])] for group in groups]


def test_weight_decay_groups_equal_the_reference(golden: Golden) -> None:
    model = MAE(SMALL)
    expected = json.loads(str(golden("f64/mae_small")["wd_groups_json"]))
    assert names_of(model, weight_decay_groups(model, 0.05)) == [[decay, sorted(names)] for decay, names in expected]


def test_weight_decay_groups_of_vit_base_have_the_sizes_of_the_reference(golden: Golden) -> None:
    with torch.device("meta"):
        model = MAE(MAEConfig())
    groups = weight_decay_groups(model, 0.05)
    for group, expected in zip(groups, json.loads(str(golden("f64/optim")["wd_split_base_json"])), strict=True):
        assert group["weight_decay"] == expected["weight_decay"]
        assert len(group["params"]) == expected["n"]
        assert sum(parameter.numel() for parameter in group["params"]) == expected["numel"]


def test_tokens_decay_and_biases_do_not() -> None:
    model = MAE(SMALL)
    (_, undecayed), (decay, decayed) = names_of(model, weight_decay_groups(model, 0.3))
    assert decay == 0.3
    assert {"cls_token", "mask_token"} <= set(decayed)
    assert {"norm.weight", "patch_embed.proj.bias"} <= set(undecayed)


def test_frozen_parameters_are_in_no_group() -> None:
    model = MAE(SMALL)
    model.blocks.requires_grad_(False)
    names = [name for _, group in names_of(model, weight_decay_groups(model, 0.05)) for name in group]
    assert "norm.weight" in names
    assert not any(name.startswith("blocks.") for name in names)


@pytest.mark.parametrize("schedule", ["pretrain", "finetune_base", "finetune_large", "linprobe"])
def test_learning_rates_equal_the_reference_at_each_iteration(golden: Golden, schedule: str) -> None:
    vectors = golden("f64/optim")
    args = json.loads(str(vectors[f"lr_{schedule}_args"]))
    options = {
        "peak": args["lr"],
        "floor": args["min_lr"],
        "warmup_steps": args["warmup_epochs"] * args["ipe"],
        "total_steps": args["epochs"] * args["ipe"],
    }
    rates = [lr_at(int(step), **options) for step in vectors[f"lr_{schedule}_it"]]
    # The last rates are differences of nearly equal numbers, so the tolerance is relative to the peak.
    np.testing.assert_allclose(rates, vectors[f"lr_{schedule}"], rtol=1e-12, atol=1e-15 * args["lr"])


def test_learning_rates_equal_the_reference_at_fractional_epochs(golden: Golden) -> None:
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


VITS = {
    "vit_base": ClassifierConfig(),
    "vit_large": ClassifierConfig(dim=1024, depth=24, heads=16),
    "vit_huge": ClassifierConfig(patch_size=14, dim=1280, depth=32, heads=16),
}
LAYERS = json.loads((Path(__file__).parents[1] / "golden" / "f64" / "lr_decay_groups.json").read_text())


@pytest.mark.parametrize("case", LAYERS)
def test_layer_decay_groups_equal_the_reference(case: str) -> None:
    size, decay = case.rsplit("_", 1)
    with torch.device("meta"):
        model = build_classifier(VITS[size])
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = layer_decay_groups(model, 0.05, float(decay))
    for group, expected in zip(groups, LAYERS[case], strict=True):
        assert group["lr_scale"] == pytest.approx(expected["lr_scale"], rel=1e-14)
        assert group["weight_decay"] == expected["weight_decay"]
        assert len(group["params"]) == expected["n_params"]
        assert sum(parameter.numel() for parameter in group["params"]) == expected["numel"]
        assert set(expected["names"]) <= {names[parameter] for parameter in group["params"]}


@pytest.mark.parametrize(("size", "decay"), [("vit_base", 0.65), ("vit_large", 0.75)])
def test_each_parameter_has_the_same_layer_as_in_the_reference(golden: Golden, size: str, decay: float) -> None:
    with torch.device("meta"):
        model = build_classifier(VITS[size])
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr_scale"], "yes" if group["weight_decay"] else "no")
        for group in layer_decay_groups(model, 0.05, decay)
        for parameter in group["params"]
    }
    lines = [line.split() for line in golden("optim")[f"layer_decay/{size}_patch16_224"]]
    assert found.keys() == {name for name, *_ in lines}
    for name, _, scale, decays in lines:
        assert found[name] == (pytest.approx(float(scale.split("=")[1]), rel=1e-8), decays.split("=")[1]), name


def test_frozen_layers_are_in_no_layer_decay_group() -> None:
    model = build_classifier(ClassifierConfig(classes=3, image_size=(32, 32), dim=32, depth=3, heads=2))
    model.blocks[:2].requires_grad_(False)
    assert [group["lr_scale"] for group in layer_decay_groups(model, 0.05, 0.5)] == [1 / 16, 1 / 16, 0.5, 0.5, 1, 1]


def lars_inputs(shapes: dict[str, tuple[int, ...]], steps: int) -> tuple[dict[str, torch.nn.Parameter], list[dict]]:
    """Parameters and gradients of the float64 vectors: `e` starts at zero; the gradient of `w` is zero at step 2."""

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))

    start = {name: draw(f"lars/{name}", shape) * (name != "e") for name, shape in shapes.items()}
    gradients = [
        {name: 0.1 * draw(f"lars/grad/{name}/{t}", shape) * ((name, t) != ("w", 2)) for name, shape in shapes.items()}
        for t in range(steps)
    ]
    return {name: torch.nn.Parameter(tensor) for name, tensor in start.items()}, gradients


@pytest.mark.parametrize("weight_decay", ["0.0", "0.001"])
@pytest.mark.parametrize("resumed_at", [None, 3])
def test_lars_equals_the_reference_in_float64(golden: Golden, weight_decay: str, resumed_at: int | None) -> None:
    """Also if another optimizer resumes from a copied `state_dict`."""
    vectors = golden("f64/optim")
    parameters, gradients = lars_inputs({"w": (4, 3), "b": (4,), "e": (2, 2)}, steps=5)
    optimizer = LARS(parameters.values(), lr=0.0, weight_decay=float(weight_decay))
    for step, gradient in enumerate(gradients):
        if step == resumed_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = LARS(parameters.values(), lr=1.0, momentum=0.1)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 6.4 * (step + 1) / 5
        for name, parameter in parameters.items():
            parameter.grad = gradient[name]
        optimizer.step()
        for name, parameter in parameters.items():
            expected = vectors[f"lars_wd{weight_decay}_{name}"][step]
            np.testing.assert_allclose(parameter.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight_decay", ["0.0", "0.05"])
def test_lars_equals_the_reference_in_float32(golden: Golden, weight_decay: str) -> None:
    vectors = golden("optim")
    parameters = {name: torch.nn.Parameter(torch.from_numpy(vectors[f"lars_{name}0"])) for name in "wb"}
    optimizer = LARS(parameters.values(), lr=0.3, weight_decay=float(weight_decay))
    for step in range(5):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(vectors[f"lars_g{name}"][step])
        optimizer.step()
        for name, parameter in parameters.items():
            expected = vectors[f"lars_wd{weight_decay}_{name}"][step]
            np.testing.assert_allclose(parameter.detach(), expected, rtol=1e-6, atol=1e-6)


def test_lars_does_not_change_gradients_and_accepts_a_closure() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.full((2, 2), 3.0)
    optimizer = LARS([parameter], lr=0.1, weight_decay=0.5)
    assert optimizer.step(lambda: torch.tensor(7.0)) == 7
    assert torch.equal(parameter.grad, torch.full((2, 2), 3.0))


def test_lars_on_partitioned_matrices_equals_lars_on_whole_ones() -> None:
    """Each of two flat parameters holds a part of both matrices, as under ZeRO; one also holds a vector."""
    draw = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((4, 6), (5, 3))]
    vector = torch.nn.Parameter(torch.randn(4, generator=draw))
    flats = [
        torch.nn.Parameter(torch.cat([matrices[0].flatten()[:10], matrices[1].flatten()[:9], vector]).detach()),
        torch.nn.Parameter(torch.cat([matrices[0].flatten()[10:], matrices[1].flatten()[9:]]).detach()),
    ]
    whole, partitioned = (LARS(each, 0.3, weight_decay=0.01) for each in ([*matrices, vector], flats))
    partitioned.set_partition(
        {flats[0]: [Span(0, 10, 0), Span(10, 9, 1)], flats[1]: [Span(0, 14, 0), Span(14, 6, 1)]}, 2, lambda s: s
    )
    for _ in range(3):
        for parameter in (*matrices, vector):
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        grads = [matrix.grad.flatten() for matrix in matrices if matrix.grad is not None]
        flats[0].grad = torch.cat([grads[0][:10], grads[1][:9], vector.grad])  # type: ignore[list-item]
        flats[1].grad = torch.cat([grads[0][10:], grads[1][9:]])
        whole.step()
        partitioned.step()
    assert torch.equal(flats[0][:10], matrices[0].flatten()[:10]) and torch.equal(flats[0][19:], vector)
    assert torch.equal(flats[1][14:], matrices[1].flatten()[9:])
