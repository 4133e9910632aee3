"""Float64 parity with the reference implementation, which shows even a wrong GELU form or epsilon."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

from maelstream.model.config import MAEConfig, Target, keep_count
from maelstream.model.mae import MAE
from maelstream.model.masking import Mask, gather_patches, mask_by_score
from maelstream.model.optimise import lr_at, weight_decay_groups
from maelstream.model.patches import patch_statistics, patchify, pixel_target, unpatchify

Golden = Callable[[str], Mapping[str, np.ndarray]]

SMALL = MAEConfig(image_size=(64, 64), dim=64, depth=2, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4)
TARGETS: dict[str, Target] = {"npl0": "pixel", "npl1": "normalised_pixel"}
SHAPES = json.loads((Path(__file__).parents[1] / "golden/f64/state_dict_shapes.json").read_text())
SIZES = {
    "base": MAEConfig(),
    "large": MAEConfig(dim=1024, depth=24, heads=16),
    "huge": MAEConfig(dim=1280, depth=32, heads=16, patch_size=14),
}


def drawn(name: str, shape: tuple[int, ...], kind: str = "standard_normal") -> np.ndarray:
    return getattr(np.random.RandomState(zlib.crc32(name.encode())), kind)(shape)


def with_golden_weights(config: MAEConfig) -> MAE:
    model = MAE(config)
    for name, parameter in model.named_parameters():
        weights = 0.05 * drawn(name, tuple(parameter.shape))
        weights += name.endswith(".weight") and parameter.ndim == 1
        parameter.data.copy_(torch.from_numpy(weights.astype(np.float32)))
    return model.double()


@pytest.fixture(scope="module")
def base_weights() -> dict[str, torch.Tensor]:
    """Weights of ViT-B, drawn once: drawing 112 million numbers takes seconds."""
    return with_golden_weights(MAEConfig()).float().state_dict()


def base_model(weights: dict[str, torch.Tensor], **options: Any) -> MAE:
    model = MAE(MAEConfig(**options))
    model.load_state_dict(weights)
    return model


def widened(name: str, shape: tuple[int, ...], kind: str = "standard_normal") -> torch.Tensor:
    return torch.from_numpy(drawn(name, shape, kind).astype(np.float32)).double()


def small_inputs(model: MAE, suffix: str = "") -> tuple[torch.Tensor, Mask]:
    """Images and mask, on the device of the model."""
    device = model.cls_token.device
    mask = mask_by_score(widened(f"noise{suffix}", (3, 16), "random_sample").to(device), model.config.keep)
    return widened(f"images{suffix}", (3, 3, 64, 64)).to(device), mask


def base_inputs(
    vectors: Mapping[str, np.ndarray], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, Mask]:
    mean, std = np.array(MAEConfig().mean), np.array(MAEConfig().std)
    images = ((vectors["images_u8"] / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    noise = widened("noise", (2, 196), "random_sample").to(device)
    return torch.from_numpy(images).to(device, dtype), mask_by_score(noise, 49)


def predictions_of(model: MAE, images: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        patches = patchify(images, model.config.patch_size)
        latent = model.encode_patches(gather_patches(patches, mask.kept), mask.kept)
        return latent, model.predict(model.decode(latent, mask.restore))


def gradients_of(model: MAE) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}


def close(actual: ArrayLike, reference: ArrayLike, tolerance: float) -> None:
    actual = actual.cpu() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(np.asarray(actual), np.asarray(reference), rtol=tolerance, atol=tolerance)


def test_masks_of_the_small_model_equal_the_reference_exactly(golden: Golden, device: torch.device) -> None:
    vectors = golden("f64/mae_small")
    mask = Mask(*(numbers.cpu() for numbers in small_inputs(MAE(SMALL).to(device))[1]))
    assert np.array_equal(torch.cat([mask.kept, mask.removed], dim=1), vectors["ids_shuffle"])
    assert np.array_equal(mask.restore, vectors["ids_restore"])
    assert np.array_equal(mask.restore >= 4, vectors["mask"] == 1)


def test_latent_and_predictions_of_the_small_model_equal_the_reference(golden: Golden, device: torch.device) -> None:
    vectors = golden("f64/mae_small")
    model = with_golden_weights(SMALL).to(device)
    latent, predictions = predictions_of(model, *small_inputs(model))
    close(latent, vectors["latent_f64"], 1e-8)
    close(predictions[:1], vectors["pred_f64"], 1e-8)
    close(predictions.sum(2), vectors["pred_sum_f64"], 1e-8)
    close(unpatchify(predictions, 16, (4, 4))[:1, :, ::8, ::8], vectors["unpatchify_pred_f32"], 1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_loss_and_gradients_of_the_small_model_equal_the_reference(
    golden: Golden, target: str, device: torch.device
) -> None:
    vectors = golden("f64/mae_small")
    model = with_golden_weights(dataclasses.replace(SMALL, target=TARGETS[target])).to(device)
    loss = model.loss(*small_inputs(model))
    loss.backward()
    gradients = gradients_of(model)
    close(loss.detach(), vectors[f"{target}_f64_loss"], 1e-10)
    norms = [gradients[name].norm() for name in vectors["param_names"]]
    np.testing.assert_allclose(norms, vectors[f"{target}_f64_gradnorm"], rtol=1e-8)
    close(gradients["cls_token"], vectors[f"{target}_f64_grad_cls_token"], 1e-10)
    close(gradients["mask_token"], vectors[f"{target}_f64_grad_mask_token"], 1e-10)


def test_the_normalised_target_equals_the_reference(golden: Golden, device: torch.device) -> None:
    vectors = golden("f64/mae_small")
    patches = patchify(small_inputs(MAE(SMALL).to(device))[0], 16)
    mean, deviation = patch_statistics(patches)
    close(mean, vectors["target_norm_mean"], 1e-12)
    close(deviation**2 - 1e-6, vectors["target_norm_var_unbiased"], 1e-12)
    assert np.array_equal(patches[:1].float().cpu(), vectors["patchify_f32"])
    subset = vectors["target_norm_sub_f64"]
    close(pixel_target(patches, "normalised_pixel")[..., :: 768 // subset.shape[2]], subset, 1e-10)


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.8])
def test_the_loss_at_other_mask_ratios_equals_the_reference(golden: Golden, ratio: float, device: torch.device) -> None:
    vectors = golden("f64/mae_small")
    model = with_golden_weights(dataclasses.replace(SMALL, mask_ratio=ratio)).to(device)
    images, mask = small_inputs(model)
    assert [mask.removed.shape[1]] * 3 == vectors[f"ratio{ratio}_masksum"].tolist()
    close(model.loss(images, mask).detach(), vectors[f"ratio{ratio}_loss"], 1e-10)


def test_the_number_of_kept_patches_equals_the_reference(golden: Golden) -> None:
    for num_patches, ratio, kept in golden("f64/mae_small")["len_keep_table"]:
        assert keep_count(int(num_patches), ratio) == kept
    assert keep_count(100, 0.9) == 9


def test_six_steps_of_adamw_equal_the_reference(golden: Golden, device: torch.device) -> None:
    vectors = golden("f64/mae_small")
    model = with_golden_weights(SMALL).to(device)
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.05), betas=(0.9, 0.95), eps=1e-8)
    for step in range(6):
        lr = lr_at(step, peak=1e-2, floor=0.0, warmup_steps=3, total_steps=6)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model.loss(*small_inputs(model, f"/{step}"))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm(gradients_of(model).values())
        optimizer.step()
        close(lr, vectors["train_lr"][step], 1e-15)
        close(loss.detach(), vectors["train_loss_f64"][step], 1e-10)
        close(norm, vectors["train_gradnorm"][step], 1e-8)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    close(weights["cls_token"], vectors["train_final_cls_token"], 1e-8)
    close(weights["mask_token"], vectors["train_final_mask_token"], 1e-8)
    close(weights["blocks.0.attn.qkv.weight"][::16, ::8], vectors["train_final_qkv0_sub"], 1e-8)
    close(weights["norm.bias"], vectors["train_final_norm_bias"], 1e-8)


@pytest.mark.parametrize("target", TARGETS)
def test_loss_and_gradients_of_vit_base_equal_the_reference(
    golden: Golden, base_weights: dict[str, torch.Tensor], target: str, device: torch.device
) -> None:
    vectors = golden("f64/mae_base")
    model = base_model(base_weights, target=TARGETS[target]).to(device).double()
    loss = model.loss(*base_inputs(vectors, torch.float64, device))
    loss.backward()
    close(loss.detach(), vectors[f"{target}_f64_loss"], 1e-10)
    gradients = gradients_of(model)
    norms = [gradients[name].norm() for name in vectors[f"{target}_gradnorm_names"]]
    np.testing.assert_allclose(norms, vectors[f"{target}_gradnorm"], rtol=1e-8)


def test_masks_latent_and_predictions_of_vit_base_equal_the_reference(
    golden: Golden, base_weights: dict[str, torch.Tensor], device: torch.device
) -> None:
    vectors = golden("f64/mae_base")
    images, mask = base_inputs(vectors, torch.float64, device)
    latent, predictions = predictions_of(base_model(base_weights).to(device).double(), images, mask)
    assert np.array_equal(mask.restore.cpu(), vectors["ids_restore"])
    assert np.array_equal(mask.restore.cpu() >= 49, vectors["mask"] == 1)
    close(latent[:, ::7, ::32], vectors["latent_sub_f64"], 1e-8)
    close(latent.abs().mean(), vectors["latent_absmean"], 1e-8)
    close(predictions[:, ::14, ::48], vectors["pred_sub_f64"], 1e-8)
    close(predictions.abs().mean(), vectors["pred_absmean"], 1e-8)


@pytest.mark.parametrize("attention", ["math", "sdpa"])
def test_the_loss_of_vit_base_in_lower_precision_is_near_the_reference(
    golden: Golden, base_weights: dict[str, torch.Tensor], attention: str, device: torch.device
) -> None:
    """The loss is 2.244; float32 is within 2e-6, bf16 autocast within 2e-3, bf16 weights within 5e-3."""
    vectors = golden("f64/mae_base")
    images, mask = base_inputs(vectors, torch.float32, device)
    model = base_model(base_weights, attention=attention).to(device)
    reference = vectors["npl1_f64_loss"]
    with torch.no_grad():
        close(model.loss(images, mask), reference, 2e-6)  # the reference in float32 differs by 1e-7
        with torch.autocast(device.type, torch.bfloat16):
            autocast = model.loss(images, mask)
        whole = model.bfloat16().loss(images, mask)  # as in DeepSpeed's bf16 mode
    assert autocast.dtype == whole.dtype == torch.float32
    assert abs(float(autocast) - reference) < 2e-3
    assert abs(float(whole) - reference) < 5e-3


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_has_the_keys_and_shapes_of_the_published_checkpoints(size: str) -> None:
    with torch.device("meta"):
        state = MAE(SIZES[size]).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == SHAPES[size]
