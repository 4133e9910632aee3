"""Weight formats: exact conversion of names, and equal results from models of other libraries."""

import dataclasses
import json
import os
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before importing timm and transformers

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from maelstream.model.config import MAEConfig
from maelstream.model.formats import (
    describe_model,
    from_hf,
    has_decoder,
    mismatches,
    nonfinite_names,
    square_grid,
    to_hf,
    to_hf_file,
    to_reference,
    without_decoder,
)
from maelstream.model.mae import MAE, position_tables
from maelstream.model.masking import mask_by_score
from maelstream.model.patches import normalise

GOLDEN = Path(__file__).parents[1] / "golden" / "f64"
TINY = MAEConfig((64, 64), dim=64, depth=2, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4)
CONFIGS = {"tiny": TINY, "base": MAEConfig()}


def golden_weights(config: MAEConfig) -> dict[str, Tensor]:
    """Weights by the rule in tests/golden/README.md, and the fixed position tables."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in MAE(config).named_parameters()}
    weights = {}
    for name, shape in shapes.items():
        draw = 0.05 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        scale = name.endswith(".weight") and len(shape) == 1
        weights[name] = torch.from_numpy((draw + scale).astype(np.float32))
    return weights | position_tables(config)


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> MAEConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def weights(config: MAEConfig) -> dict[str, Tensor]:
    return golden_weights(config)


@pytest.fixture(scope="module")
def model(config: MAEConfig, weights: dict[str, Tensor]) -> MAE:
    model = MAE(config).double()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def images(config: MAEConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, *config.image_size), dtype=torch.uint8, generator=generator)


def hf_model(config: MAEConfig) -> ViTMAEForPreTraining:
    with torch.device("meta"):
        model = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=config.dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                intermediate_size=int(config.dim * config.mlp_ratio),
                decoder_hidden_size=config.decoder_dim,
                decoder_num_hidden_layers=config.decoder_depth,
                decoder_num_attention_heads=config.decoder_heads,
                decoder_intermediate_size=int(config.decoder_dim * config.mlp_ratio),
                image_size=config.image_size[0],
                patch_size=config.patch_size,
                layer_norm_eps=1e-6,
                norm_pix_loss=config.target == "normalised_pixel",
                mask_ratio=config.mask_ratio,
            )
        )
    return model.to_empty(device="cpu").double()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_conversion_to_huggingface_and_back_is_exact(weights: dict[str, Tensor]) -> None:
    converted = to_hf(weights)
    assert_same(from_hf(converted), weights)
    assert_same(to_reference(converted), weights)
    assert_same(to_reference(to_hf_file(weights)), weights)
    assert_same(to_reference(to_hf(without_decoder(weights))), without_decoder(weights))


def test_huggingface_names_are_those_of_its_model() -> None:
    with torch.device("meta"):
        converted = to_hf(MAE(MAEConfig()).state_dict())
    expected = json.loads((GOLDEN / "hf_vitmae_keys.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in converted.items()} == expected


def test_files_have_the_names_of_published_files() -> None:
    """`facebook/vit-mae-base` has these names, and every release loads them; module names are newer."""
    block = (
        "layernorm_before layernorm_after attention.attention.query attention.attention.key attention.attention.value"
    )
    block += " attention.output.dense intermediate.dense output.dense"
    expected = {
        f"{stack}.1.{part}.{kind}"
        for stack in ("vit.encoder.layer", "decoder.decoder_layers")
        for part in block.split()
        for kind in ("weight", "bias")
    }
    converted = to_hf_file(golden_weights(TINY))
    assert {name for name in converted if ".1." in name} == expected
    outside = {name for name in to_hf(golden_weights(TINY)) if "layers." not in name}
    assert outside == {name for name in converted if "layer." not in name and "layers." not in name}


def test_files_written_by_huggingface_are_read(tmp_path: Path) -> None:
    """Release 5.23 writes the names of files, except `decoder.decoder_encoder.layer`, which only it has."""
    weights = golden_weights(TINY)
    huggingface = hf_model(TINY).float()
    huggingface.load_state_dict(to_hf(weights))
    huggingface.save_pretrained(tmp_path / "whole")
    huggingface.vit.save_pretrained(tmp_path / "encoder")
    assert_same(to_reference(load_file(tmp_path / "whole" / "model.safetensors")), weights)
    assert_same(to_reference(load_file(tmp_path / "encoder" / "model.safetensors")), without_decoder(weights))
    assert isinstance(huggingface.vit, ViTMAEModel)


def both_losses(model: MAE, weights: dict[str, Tensor], images: Tensor) -> tuple[float, float]:
    config, huggingface = model.config, hf_model(model.config)
    huggingface.load_state_dict(to_hf(weights))
    noise = torch.from_numpy(np.random.RandomState(1).random_sample((len(images), config.num_patches)))
    pixels = normalise(images, config.mean, config.std).double()
    with torch.no_grad():
        loss = model.loss(pixels, mask_by_score(noise, config.keep))
        return loss.item(), huggingface(pixels, noise=noise).loss.item()


def test_the_loss_equals_huggingface_on_the_same_mask(model: MAE, weights: dict[str, Tensor], images: Tensor) -> None:
    loss, expected = both_losses(model, weights, images)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_the_loss_on_plain_pixels_equals_huggingface() -> None:
    model, weights = MAE(dataclasses.replace(TINY, target="pixel")).double(), golden_weights(TINY)
    model.load_state_dict(weights)
    loss, expected = both_losses(model, weights, torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8))
    assert loss == pytest.approx(expected, rel=1e-12)


def test_features_equal_timm(config: MAEConfig, weights: dict[str, Tensor], model: MAE, images: Tensor) -> None:
    options = {"img_size": config.image_size, "embed_dim": config.dim, "depth": config.depth, "num_heads": config.heads}
    with torch.device("meta"):
        by_timm = timm.create_model("vit_base_patch16_224.mae", num_classes=0, **options)
    by_timm = by_timm.to_empty(device="cpu").double().eval()
    by_timm.load_state_dict(without_decoder(weights), strict=True)
    with torch.no_grad():
        features = by_timm.forward_features(normalise(images, config.mean, config.std).double())
        assert (features - model.encode(images)).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_base_patch16_224.mae", MAEConfig()),
        ("vit_large_patch16_224.mae", MAEConfig(dim=1024, depth=24, heads=16)),
        ("vit_huge_patch14_224.mae", MAEConfig(patch_size=14, dim=1280, depth=32, heads=16)),
    ],
)
def test_mae_models_of_timm_have_the_names_and_shapes_of_the_encoder(name: str, size: MAEConfig) -> None:
    with torch.device("meta"):
        weights, expected = MAE(size).state_dict(), timm.create_model(name).state_dict()
    assert not mismatches(without_decoder(weights), expected)
    assert has_decoder(weights) and not has_decoder(without_decoder(weights))


def test_weights_that_are_not_of_an_mae_raise() -> None:
    with pytest.raises(ValueError, match=r"not MAE weights: .* \(the first names are conv1\.weight\)"):
        to_reference({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="the first names are none"):
        to_reference({})


def test_a_missing_part_of_query_key_and_value_is_reported() -> None:
    converted = to_hf(golden_weights(TINY))
    del converted["vit.layers.1.attention.k_proj.bias"]
    phrases = mismatches(to_reference(converted), golden_weights(TINY))
    assert phrases[0] == "blocks.1.attn.qkv.bias is missing"
    assert "vit.layers.1.attention.q_proj.bias is not in the model" in phrases and len(phrases) == 3


def test_mismatches_of_another_size_are_reported_for_each_tensor() -> None:
    with torch.device("meta"):
        base, large = MAE(MAEConfig()).state_dict(), MAE(MAEConfig(dim=1024, depth=24, heads=16)).state_dict()
    phrases = mismatches(large, base)
    assert "cls_token is (1, 1, 1024) where the model has (1, 1, 768)" in phrases
    assert "blocks.12.norm1.weight is not in the model" in phrases
    assert "blocks.12.norm1.weight is missing" in mismatches(base, large)
    assert not mismatches(base, base)


def test_a_model_is_described_by_its_shapes() -> None:
    with torch.device("meta"):
        huge = MAE(MAEConfig(patch_size=14, dim=1280, depth=32, heads=16)).state_dict()
        wide = MAE(dataclasses.replace(TINY, image_size=(32, 80))).state_dict()
    assert describe_model(huge) == "ViT-H/14 (1280 x 32), 224 x 224 px, decoder 512 x 8"
    assert describe_model(without_decoder(huge)) == "ViT-H/14 (1280 x 32), 224 x 224 px, no decoder"
    assert describe_model(wide) == "ViT/16 (64 x 2), decoder 32 x 2"
    assert square_grid(huge) == (16, 16) and square_grid(wide) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_reported(value: float) -> None:
    weights = golden_weights(TINY)
    assert not nonfinite_names(weights)
    weights["blocks.1.mlp.fc1.weight"][3, 5] = value
    assert nonfinite_names(weights) == ["blocks.1.mlp.fc1.weight"]
