"""The masked autoencoder beyond parity: dependencies of the loss, other shapes, errors, reconstructions."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from maelstream.model.config import MAEConfig, Target
from maelstream.model.mae import MAE, position_tables
from maelstream.model.masking import Mask, draw_mask, gather_patches, random_mask
from maelstream.model.patches import normalise, patchify, pixel_target
from maelstream.model.transformer import PatchProjection
from tests.helpers.tiny_mae import TINY, batch, tiny

SHAPES = {
    "square": {},
    "wide": {"image_size": (32, 64)},
    "tall": {"image_size": (48, 16)},
    "grey": {"in_chans": 1, "mean": (0.4,), "std": (0.3,)},
    "six channels": {"in_chans": 6, "mean": (0.5,) * 6, "std": (0.2,) * 6},
    "CIFAR": {"image_size": (32, 32), "patch_size": 4},
    "pixel target": {"target": "pixel"},
    "block mask": {"mask": "block"},
    "grid mask": {"mask": "grid"},
    "encoder mask tokens": {"encoder_mask_tokens": True},
}


def patches_of(model: MAE, images: torch.Tensor) -> torch.Tensor:
    return patchify(normalise(images, model.config.mean, model.config.std), model.config.patch_size)


def mask_of(config: MAEConfig, keys: torch.Tensor) -> Mask:
    return draw_mask(config.mask, keys, config.grid, config.keep)


def latent_of(model: MAE, images: torch.Tensor, mask: Mask) -> torch.Tensor:
    return model.encode_masked(patches_of(model, images), mask)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_gathering_before_embedding_equals_gathering_after(options: dict[str, Any]) -> None:
    model = tiny(**options)
    config = model.config
    images, keys = batch(config)
    mask = mask_of(config, keys)
    projection = model.patch_embed[0]
    assert isinstance(projection, PatchProjection)
    normalised = normalise(images, config.mean, config.std)
    embedded = F.conv2d(normalised, projection.weight, projection.bias, stride=config.patch_size)
    positions = model.pos_embed[:, 1:].expand(len(images), -1, -1)
    tokens = gather_patches(embedded.flatten(2).transpose(1, 2) + positions, mask.kept)
    if config.encoder_mask_tokens:
        tokens = torch.cat([tokens, model.encoder_mask_token + gather_patches(positions, mask.removed)], dim=1)
    tokens = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1), tokens], dim=1)
    assert torch.allclose(latent_of(model, images, mask), model.norm(model.blocks(tokens)), atol=1e-5)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_the_loss_is_the_error_of_the_full_prediction_over_removed_patches(options: dict[str, Any]) -> None:
    model = tiny(**options)
    config = model.config
    images, keys = batch(config)
    mask = mask_of(config, keys)
    predictions = model.predict(model.decode(latent_of(model, images, mask), mask.restore))
    errors = ((predictions - pixel_target(patches_of(model, images), config.target)) ** 2).mean(2)  # (B, L)
    removed = (mask.restore >= config.keep).float()
    loss = model(images, keys)
    loss.backward()
    assert torch.allclose(loss, (errors * removed).sum() / removed.sum(), rtol=1e-5)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_the_loss_of_a_batch_is_the_mean_over_its_images() -> None:
    model = tiny()
    images, keys = batch(TINY, 5)
    alone = torch.stack([model(image[None], key[None]) for image, key in zip(images, keys, strict=True)])
    assert torch.allclose(model(images, keys), alone.mean(), rtol=1e-5)


def test_only_kept_patches_influence_the_latent() -> None:
    model = tiny()
    images, keys = batch(TINY)
    mask = random_mask(keys, 16, 4)
    latent = latent_of(model, images, mask)
    for numbers, same in ((mask.removed, True), (mask.kept[:, :1], False)):
        chosen = torch.zeros(3, 16).scatter_(1, numbers, 1.0).reshape(3, 1, 4, 4)
        pixels = F.interpolate(chosen, scale_factor=8).bool()  # nearest
        altered = torch.where(pixels, 255 - images, images)
        assert torch.equal(latent_of(model, altered, mask), latent) == same


def test_decoder_features_follow_the_positions_of_the_patches() -> None:
    model = tiny()
    images, keys = batch(TINY)
    mask = random_mask(keys, 16, 4)
    shuffle = torch.tensor([2, 0, 3, 1])
    other = Mask(mask.kept[:, shuffle], mask.removed, torch.cat([mask.kept[:, shuffle], mask.removed], 1).argsort(1))
    features, shuffled = (model.decode(latent_of(model, images, each), each.restore) for each in (mask, other))
    assert torch.allclose(features, shuffled, atol=1e-5)


def test_decoder_features_do_not_depend_on_the_order_of_the_tokens() -> None:
    """A decoder on tokens in row-major order, without the sorts of `decode`, computes the same features."""
    model = tiny()
    images, keys = batch(TINY)
    mask = random_mask(keys, 16, 4)
    latent = latent_of(model, images, mask)
    visible = model.decoder_embed(latent)
    tokens = torch.cat([visible[:, 1:], model.mask_token.expand(3, 12, -1)], dim=1)
    tokens = torch.cat([visible[:, :1], gather_patches(tokens, mask.restore)], dim=1) + model.decoder_pos_embed
    assert torch.allclose(model.decode(latent, mask.restore), model.decoder_blocks(tokens)[:, 1:], atol=1e-5)


def test_an_encoder_with_mask_tokens_sees_all_positions_and_the_decoder_adds_none() -> None:
    model = tiny(encoder_mask_tokens=True)
    images, keys = batch(TINY)
    mask = random_mask(keys, 16, 4)
    latent = latent_of(model, images, mask)
    assert latent.shape == (3, 17, 32)
    all_positions = torch.cat([latent[:, :1], gather_patches(latent[:, 1:], mask.restore)], dim=1)
    tokens = model.decoder_embed(all_positions) + model.decoder_pos_embed
    assert torch.allclose(model.decode(latent, mask.restore), model.decoder_blocks(tokens)[:, 1:], atol=1e-5)
    shown = torch.zeros(3, 16).scatter_(1, mask.removed, 1.0).reshape(3, 1, 4, 4)
    altered = torch.where(F.interpolate(shown, scale_factor=8).bool(), 255 - images, images)
    assert torch.equal(latent_of(model, altered, mask), latent)


def test_only_models_with_encoder_mask_tokens_have_that_parameter() -> None:
    with_tokens, without = tiny(encoder_mask_tokens=True).state_dict(), tiny().state_dict()
    assert with_tokens.keys() - without.keys() == {"encoder_mask_token"}
    assert without.keys() - with_tokens.keys() == {"mask_token"}
    assert with_tokens["encoder_mask_token"].shape == (1, 1, 32)
    assert all(torch.equal(with_tokens[name], without[name]) for name in with_tokens.keys() & without.keys())


def test_features_of_whole_images_need_no_mask() -> None:
    images, _ = batch(TINY)
    model, unmasked = tiny(), tiny(mask_ratio=0.0)
    features = model.encode(images)
    assert features.shape == (3, 17, 32)
    assert features.isfinite().all()
    assert torch.equal(features, model.encode(images))
    assert torch.equal(features, unmasked.encode(images))


def test_a_mask_that_removes_nothing_raises() -> None:
    model = tiny(mask_ratio=0.0)
    for call in (model.forward, model.reconstruct):
        with pytest.raises(ValueError, match=r"mask_ratio 0\.0 removes none of 16 patches"):
            call(*batch(TINY))


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 40, dtype=torch.uint8)])
def test_images_of_another_dtype_or_shape_raise(images: torch.Tensor) -> None:
    model = tiny()
    for call in (lambda: model(images, torch.arange(2)), lambda: model.encode(images)):
        with pytest.raises(ValueError, match=r"uint8 of shape \(batch, 3, 32, 32\)"):
            call()


@pytest.mark.parametrize("target", ["pixel", "normalised_pixel"])
def test_a_perfect_prediction_reconstructs_the_image(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(target=target)
    images, keys = batch(TINY)
    monkeypatch.setattr(model, "predict", lambda decoded: pixel_target(patches_of(model, images), target))
    picture = model.reconstruct(images, keys)
    assert picture.loss == 0
    assert (picture.reconstructed - images / 255).abs().max() < 1e-5


def test_a_reconstruction_shows_visible_patches_unchanged_and_hides_the_others() -> None:
    model = tiny()
    images, keys = batch(TINY)
    picture = model.reconstruct(images, keys)
    hidden = (random_mask(keys, 16, 4).restore >= 4).float().reshape(3, 1, 4, 4)
    hidden = F.interpolate(hidden, scale_factor=8).bool().expand(-1, 3, -1, -1)
    assert torch.equal(picture.original, images.float() / 255)
    assert torch.equal(picture.masked, torch.where(hidden, 0.5, picture.original))
    assert torch.equal(picture.reconstructed_with_visible, torch.where(hidden, picture.reconstructed, picture.original))
    assert picture.reconstructed.min() >= 0
    assert picture.reconstructed.max() <= 1
    assert torch.allclose(picture.loss, model(images, keys), rtol=1e-6)


def test_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    first = MAE(TINY, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), generator)
    torch.manual_seed(4)
    again, other = MAE(TINY, seed=1).state_dict(), MAE(TINY, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_models_that_differ_in_their_decoders_start_from_one_encoder() -> None:
    small, large = tiny().state_dict(), tiny(decoder_depth=3, decoder_dim=32).state_dict()
    encoder = [name for name in small if not name.startswith(("decoder", "mask_token"))]
    assert encoder
    assert all(torch.equal(small[name], large[name]) for name in encoder)


def test_vit_huge_at_448_px_has_1024_patches() -> None:
    with torch.device("meta"):
        model = MAE(MAEConfig(image_size=(448, 448), dim=1280, depth=32, heads=16, patch_size=14))
        loss = model(torch.empty(2, 3, 448, 448, dtype=torch.uint8), torch.empty(2, dtype=torch.int64))
    assert model.config.num_patches == 1024
    assert model.pos_embed.shape == (1, 1025, 1280)
    assert loss.shape == ()


def test_a_model_on_the_meta_device_uses_no_memory() -> None:
    with torch.device("meta"):
        model = MAE(MAEConfig(dim=1280, depth=32, heads=16, patch_size=14))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 657_074_508


def test_position_tables_are_saved_but_not_trained() -> None:
    model = tiny()
    assert {"pos_embed", "decoder_pos_embed"} <= set(model.state_dict())
    assert not {"pos_embed", "decoder_pos_embed"} & {name for name, _ in model.named_parameters()}


def test_a_cast_to_bf16_rounds_the_tables_but_position_tables_returns_them_exactly() -> None:
    model = tiny().bfloat16()
    images, keys = batch(TINY)
    assert model(images, keys).dtype == torch.float32
    for name, table in position_tables(TINY).items():
        difference = (model.state_dict()[name].float() - table).abs()
        assert 0 < difference.max() <= 2**-9
        assert torch.equal(tiny().state_dict()[name], table)
