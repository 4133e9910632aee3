"""Targets: exact values in float32, frozen, and invisible to optimizer, checkpoint and compiler."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from maelstream.model.config import MAEConfig
from maelstream.model.flops import forward_flops, training_flops
from maelstream.model.mae import MAE
from maelstream.model.masking import gather_patches, random_mask
from maelstream.model.optimise import weight_decay_groups
from maelstream.model.patches import normalise, patchify
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.model.tokenizer import Decoder, Encoder, TokenizerConfig, initialise, map_pixels, resize_to_grid

TINY = MAEConfig(
    image_size=(32, 48),
    patch_size=8,
    dim=32,
    depth=1,
    heads=4,
    decoder_dim=16,
    decoder_depth=1,
    decoder_heads=2,
    attention="math",
)
PCA = dataclasses.replace(TINY, target="pca", components=24)
TOKEN = dataclasses.replace(TINY, target="token", codes=40)


def pca(count: int = 24) -> PCATarget:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(192, 192, generator=generator, dtype=torch.float64)).Q
    return PCATarget(basis.T[:count], torch.randn(192, generator=generator), torch.linspace(17, 1, count))


def tokens(decoder: bool = True) -> TokenTarget:
    shape = TokenizerConfig(codes=40, hidden=8)
    parts = Encoder(shape), Decoder(shape)
    for part in parts:
        initialise(part, 1)
    return TokenTarget(parts[0], parts[1] if decoder else None, TINY.grid, TINY.patch_size, TINY.mean, TINY.std)


MODELS: dict[str, Callable[[], MAE]] = {
    "pca": lambda: MAE(PCA, target=pca()),
    "token": lambda: MAE(TOKEN, target=tokens()),
}


def batch(size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(size, 3, 4, 6, generator=generator)
    return (F.interpolate(coarse, (32, 48), mode="bilinear") * 255).to(torch.uint8), torch.arange(size) * 7 - 5


def test_the_pca_loss_is_the_error_of_the_coefficients_of_removed_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, keys) = MODELS["pca"](), batch()
    mask, target = random_mask(keys, PCA.num_patches, PCA.keep), pca()
    patches = patchify(normalise(images, PCA.mean, PCA.std), 8).double()
    coefficients = (patches - target.mean.double()) @ target.components.double().T / 3  # (B, L, K)
    noise = torch.zeros(3, PCA.num_patches, 24, dtype=torch.float64).normal_()
    monkeypatch.setattr(model, "predict", lambda decoded: gather_patches((coefficients + noise).float(), mask.removed))
    assert model(images, keys).item() == pytest.approx(
        (gather_patches(noise, mask.removed) ** 2).mean().item(), rel=1e-5
    )


def test_perfect_coefficients_decode_to_the_projection_on_the_components() -> None:
    """All components return the image itself; fewer lose exactly the part outside their span."""
    patches = patchify(normalise(batch()[0], TINY.mean, TINY.std), 8)
    for count, kept in ((192, 1.0), (24, 24 / 192)):
        target = pca(count)
        shown = target.pixels(target.expected(torch.empty(0), patches, torch.empty(0)), patches)
        centred, outside = patches - target.mean, patches - shown
        assert (outside**2).sum() / (centred**2).sum() == pytest.approx(1 - kept, abs=0.1 if count < 192 else 1e-10)
        assert (outside @ target.components.T).abs().max() < 1e-4


def test_the_expected_codes_are_those_of_the_encoder_at_the_positions_of_the_patches() -> None:
    images, keys = batch()
    mask, target = random_mask(keys, TOKEN.num_patches, TOKEN.keep), tokens()
    normalised = normalise(images, TOKEN.mean, TOKEN.std)
    codes = target.expected(normalised, torch.empty(0), mask.removed)
    whole = target.encoder(map_pixels(resize_to_grid(images.float() / 255, TOKEN.grid))).argmax(1)  # (B, 4, 6)
    assert whole.shape == (3, 4, 6) and whole.unique().numel() > 3
    for image, numbers, found in zip(whole, mask.removed, codes, strict=True):
        assert found.tolist() == [image[number // 6, number % 6].item() for number in numbers.tolist()]


def test_the_token_loss_is_log_codes_for_a_uniform_guess_and_zero_for_the_right_codes() -> None:
    target, numbers = tokens(), torch.arange(24).expand(3, -1)
    codes = target.expected(normalise(batch()[0], TOKEN.mean, TOKEN.std), torch.empty(0), numbers)
    assert target.error(torch.zeros(3, 24, 40), codes).item() == pytest.approx(math.log(40))
    assert target.error(100.0 * F.one_hot(codes, 40), codes).item() < 1e-6


def test_tokens_are_decoded_to_pixels_by_the_tokenizer() -> None:
    target, numbers = tokens(), torch.arange(24).expand(3, -1)
    normalised = normalise(batch()[0], TOKEN.mean, TOKEN.std)
    codes = target.expected(normalised, torch.empty(0), numbers)
    shown = target.pixels(F.one_hot(codes, 40).float(), patchify(normalised, 8))
    swapped = target.pixels(F.one_hot(codes.roll(1, 0), 40).float(), patchify(normalised, 8))
    assert shown.shape == (3, 24, 192)
    assert torch.allclose(shown.roll(1, 0), swapped, atol=1e-5) and not torch.allclose(shown, swapped)
    with pytest.raises(ValueError, match="has no decoder"):
        MAE(TOKEN, target=tokens(decoder=False)).reconstruct(*batch())


@pytest.mark.parametrize("name", MODELS)
def test_a_target_adds_no_parameters_and_nothing_to_the_state_dict(name: str) -> None:
    model = MODELS[name]()
    plain = MAE(TINY)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in plain.named_parameters()]
    assert len(model.state_dict()["decoder_pred.bias"]) == model.config.target_dim
    decayed = {id(p) for group in weight_decay_groups(model, 0.05) for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters()}
    assert {id(b) for b in model.target.buffers()} and not {id(b) for b in model.target.buffers()} & decayed  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MODELS)
def test_a_target_moves_with_the_model_and_stays_float32(name: str) -> None:
    model = MODELS[name]()
    before = [buffer.clone() for buffer in model.target.buffers()]  # type: ignore[union-attr]
    model.bfloat16().half().double().bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(before, model.target.buffers(), strict=True))  # type: ignore[union-attr]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.to("meta")
    assert all(buffer.is_meta and buffer.dtype == torch.float32 for buffer in model.target.buffers())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MODELS)
def test_expected_values_under_autocast_are_those_of_float32(name: str) -> None:
    model, (images, keys) = MODELS[name](), batch()
    normalised = normalise(images, TINY.mean, TINY.std)
    arguments = normalised, patchify(normalised, 8), torch.arange(24).expand(3, -1)
    assert model.target is not None
    expected = model.target.expected(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.target.expected(*arguments), expected)
        assert model(images, keys).dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_with_a_target_is_one_graph(name: str) -> None:
    model, (images, keys) = MODELS[name](), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(images, keys)
    loss.backward()
    assert torch.allclose(loss, model(images, keys), rtol=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_model_plus_those_of_the_target(name: str) -> None:
    model, (images, keys) = MODELS[name](), batch(1)
    config, target = model.config, model.target
    removed = config.num_patches - config.keep
    own = target.encoder.flops(32, 48) if isinstance(target, TokenTarget) else 2 * removed * config.patch_dim * 24
    with FlopCounterMode(display=False) as counter:
        loss = model(images, keys)
        assert counter.get_total_flops() - own == forward_flops(config)
        loss.backward()
    assert counter.get_total_flops() - own == training_flops(config)


@pytest.mark.parametrize("config", [PCA, TOKEN])
def test_a_model_without_its_target_has_features_but_no_loss(config: MAEConfig) -> None:
    model, (images, keys) = MAE(config), batch()
    assert model.encode(images).shape == (3, 25, 32)
    for call in (model.forward, model.reconstruct):
        with pytest.raises(ValueError, match=f"target {config.target} has no loss without its tensors"):
            call(images, keys)


def test_a_target_of_another_kind_or_size_raises() -> None:
    for config, target in ((TINY, pca()), (PCA, tokens()), (PCA, pca(25)), (TOKEN, pca(40))):
        with pytest.raises(ValueError, match="does not fit target"):
            MAE(config, target=target)
    with pytest.raises(ValueError, match=r"components 193 is not in 1\.\.192"):
        dataclasses.replace(PCA, components=193)
    with pytest.raises(ValueError, match="codes 1 must be at least 2"):
        dataclasses.replace(TOKEN, codes=1)
