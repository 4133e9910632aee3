"""Float32 parity with the paper's reference implementation: masks are equal, all else is within 1e-5 of its L2 norm."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from maelstream.model.config import AttentionKind, MAEConfig, Target, keep_count
from maelstream.model.mae import MAE
from maelstream.model.masking import Mask, gather_patches, mask_by_score
from maelstream.model.patches import patchify

Vectors = Mapping[str, np.ndarray]
Golden = Callable[[str], Vectors]

TARGETS: dict[str, Target] = {"pixel": "pixel", "norm": "normalised_pixel"}


def error(actual: torch.Tensor, reference: np.ndarray) -> float:
    expected = torch.from_numpy(np.asarray(reference)).double()
    return float((actual.cpu().double() - expected).norm() / expected.norm())


def with_golden_weights(config: MAEConfig, scale: float) -> MAE:
    model = MAE(config)
    for name, parameter in model.named_parameters():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        weights = rng.standard_normal(tuple(parameter.shape)).astype(np.float32) * np.float32(scale)
        parameter.data.copy_(torch.from_numpy(weights + ("norm" in name and name.endswith("weight"))))
    return model


@pytest.fixture(params=["mae_small", "mae_patch8"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vectors(name: str, golden: Golden) -> Vectors:
    return golden(name)


def config_of(vectors: Vectors, target: Target) -> MAEConfig:
    sizes = json.loads(str(vectors["config"]))
    return MAEConfig(
        image_size=(sizes["img_size"], sizes["img_size"]),
        patch_size=sizes["patch_size"],
        dim=sizes["embed_dim"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        decoder_dim=sizes["decoder_embed_dim"],
        decoder_depth=sizes["decoder_depth"],
        decoder_heads=sizes["decoder_num_heads"],
        mlp_ratio=sizes["mlp_ratio"],
        mask_ratio=float(vectors["mask_ratio"]),
        target=target,
    )


def mask_of(vectors: Vectors, config: MAEConfig, device: torch.device) -> Mask:
    return mask_by_score(torch.from_numpy(vectors["noise"]).to(device), config.keep)


def test_masks_equal_the_reference(vectors: Vectors, device: torch.device) -> None:
    config = config_of(vectors, "pixel")
    mask = Mask(*(numbers.cpu() for numbers in mask_of(vectors, config, device)))
    removed = torch.zeros(vectors["mask"].shape).scatter_(1, mask.removed, 1.0)
    assert np.array_equal(mask.restore, vectors["ids_restore"])
    assert np.array_equal(removed, vectors["mask"])
    assert config.keep == keep_count(config.num_patches, float(vectors["mask_ratio"])) == mask.kept.shape[1]


def test_patches_equal_the_reference(vectors: Vectors) -> None:
    patches = patchify(torch.from_numpy(vectors["images"]), config_of(vectors, "pixel").patch_size)
    assert np.array_equal(patches, vectors["patchified"])


def test_position_tables_equal_the_reference(vectors: Vectors) -> None:
    state = MAE(config_of(vectors, "pixel")).state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        assert np.array_equal(state[name], vectors[f"weights/{name}"])


@pytest.mark.parametrize("attention", ["math", "sdpa"])
def test_latent_and_predictions_equal_the_reference(
    vectors: Vectors, attention: AttentionKind, device: torch.device
) -> None:
    config = config_of(vectors, "pixel")
    model = with_golden_weights(dataclasses.replace(config, attention=attention), 0.05).to(device)
    mask = mask_of(vectors, config, device)
    patches = patchify(torch.from_numpy(vectors["images"]).to(device), config.patch_size)
    with torch.no_grad():
        latent = model.encode_patches(gather_patches(patches, mask.kept), mask.kept)
        predictions = model.predict(model.decode(latent, mask.restore))
    assert error(latent, vectors["latent"]) < 1e-5
    assert error(predictions, vectors["pred"]) < 1e-5


@pytest.mark.parametrize("target", TARGETS)
def test_loss_and_gradients_equal_the_reference(
    name: str, vectors: Vectors, golden: Golden, target: str, device: torch.device
) -> None:
    config = config_of(vectors, TARGETS[target])
    model = with_golden_weights(config, 0.05).to(device)
    loss = model.loss(torch.from_numpy(vectors["images"]).to(device), mask_of(vectors, config, device))
    loss.backward()
    gradients = golden(f"{name}_grad_{target}")
    assert error(loss.detach(), vectors[f"loss_{target}"]) < 1e-5
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        whole = gradients[key].ndim > 0
        assert error(parameter.grad if whole else parameter.grad.norm(), gradients[key]) < 1e-5, key


def test_vit_base_losses_and_predictions_equal_the_reference(golden: Golden, device: torch.device) -> None:
    vectors = golden("mae_vit_base")
    pixel, normalised = with_golden_weights(MAEConfig(target="pixel"), 0.02), MAE(MAEConfig(target="normalised_pixel"))
    normalised.load_state_dict(pixel.state_dict())
    pixel, normalised = pixel.to(device), normalised.to(device)
    images = torch.from_numpy(vectors["images"].astype(np.float32)).to(device)
    mask = mask_by_score(torch.from_numpy(vectors["noise"]).to(device), 49)
    patches = patchify(images, 16)
    with torch.no_grad():
        predictions = pixel.predict(
            pixel.decode(pixel.encode_patches(gather_patches(patches, mask.kept), mask.kept), mask.restore)
        )
        assert error(predictions[:, :4, :8], vectors["vit_base_patch16/pred_head"]) < 1e-5
        assert error(pixel.loss(images, mask), vectors["vit_base_patch16/loss_pixel"]) < 1e-5
        assert error(normalised.loss(images, mask), vectors["vit_base_patch16/loss_norm"]) < 1e-5
    state = [f"{name} {tuple(tensor.shape)}" for name, tensor in pixel.state_dict().items()]
    assert set(state) == set(vectors["vit_base_patch16/state_dict_keys"])
