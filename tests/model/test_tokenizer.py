"""The tokenizer: names, shapes and arithmetic of DALL-E, its loss and its FLOPs."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from maelstream.model.tokenizer import (
    Decoder,
    Encoder,
    TokenizerConfig,
    initialise,
    map_pixels,
    median_pixels,
    resize_to_grid,
    vae_loss,
)

SMALL = TokenizerConfig(codes=32, hidden=8)


def small() -> tuple[Encoder, Decoder]:
    encoder, decoder = Encoder(SMALL), Decoder(SMALL)
    initialise(encoder, 0)
    initialise(decoder, 0)
    return encoder, decoder


def test_names_and_shapes_are_those_of_the_published_encoder_and_decoder() -> None:
    """As in openai/DALL-E: a convolution has `w` and `b`; `id_path` exists where widths differ."""
    with torch.device("meta"):
        encoder, decoder = Encoder(TokenizerConfig()).state_dict(), Decoder(TokenizerConfig()).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.items()}
    assert shapes["blocks.input.w"] == (256, 3, 7, 7) and shapes["blocks.input.b"] == (256,)
    assert shapes["blocks.group_1.block_1.res_path.conv_1.w"] == (64, 256, 3, 3)
    assert shapes["blocks.group_3.block_1.id_path.w"] == (1024, 512, 1, 1)
    assert shapes["blocks.group_4.block_2.res_path.conv_4.w"] == (2048, 512, 1, 1)
    assert shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert "blocks.group_1.block_1.id_path.w" not in shapes and "blocks.group_2.block_2.id_path.w" not in shapes
    assert len(shapes) == 2 * (1 + 4 * 2 * 4 + 3 + 1)
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.items()}
    assert shapes["blocks.input.w"] == (128, 8192, 1, 1)
    assert shapes["blocks.group_1.block_1.id_path.w"] == (2048, 128, 1, 1)
    assert shapes["blocks.group_1.block_1.res_path.conv_1.w"] == (512, 128, 1, 1)
    assert shapes["blocks.group_4.block_2.res_path.conv_4.w"] == (256, 64, 3, 3)
    assert shapes["blocks.output.conv.w"] == (6, 256, 1, 1)


def test_the_encoder_equals_the_published_description() -> None:
    """The expected result is computed from the published description and the names of the weights."""
    encoder, _ = small()
    weights = encoder.state_dict()

    def conv(name: str, images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, weights[f"{name}.w"], weights[f"{name}.b"], padding=weights[f"{name}.w"].shape[2] // 2)

    mapped = map_pixels(torch.rand(2, 3, 32, 16))
    x = conv("blocks.input", mapped)
    for group in range(1, 5):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            path = x
            for number in range(1, 5):
                path = conv(f"{name}.res_path.conv_{number}", path.relu())
            x = (conv(f"{name}.id_path", x) if f"{name}.id_path.w" in weights else x) + path / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    logits = encoder(mapped)
    assert logits.shape == (2, 32, 4, 2)
    assert torch.allclose(logits, conv("blocks.output.conv", x.relu()), atol=1e-5)


@pytest.mark.parametrize("shape", [SMALL, TokenizerConfig(64, 12, 1, 3)])
def test_the_configuration_follows_from_the_weights(shape: TokenizerConfig) -> None:
    with torch.device("meta"):
        assert TokenizerConfig.from_weights(Encoder(shape).state_dict()) == shape
    with pytest.raises(ValueError, match=r"no blocks\.input\.w and no blocks\.output\.conv\.w"):
        TokenizerConfig.from_weights({"cls_token": torch.zeros(1)})


@pytest.mark.parametrize(
    ("options", "message"), [({"hidden": 6}, "not a multiple of 4"), ({"codes": 1}, "codes 1 must be at least 2")]
)
def test_an_invalid_configuration_raises(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**options)


def test_pixels_are_mapped_into_the_open_unit_interval_and_back() -> None:
    levels = torch.rand(2, 3, 8, 8)
    mapped = map_pixels(levels)
    assert mapped.min() >= 0.1 and mapped.max() <= 0.9
    statistics = torch.cat([mapped.logit(), torch.randn(2, 3, 8, 8)], dim=1)
    assert torch.allclose(median_pixels(statistics), levels, atol=1e-6)


def test_images_are_resized_to_eight_pixels_per_patch() -> None:
    levels = torch.full((1, 3, 224, 336), 0.3)
    assert resize_to_grid(levels, (14, 21)).shape == (1, 3, 112, 168)
    assert torch.allclose(resize_to_grid(levels, (14, 21)), torch.tensor(0.3))


def test_the_reconstruction_loss_is_the_logit_laplace_likelihood() -> None:
    """Its density integrates to the Laplace probability of the interval, for a given location and scale."""
    encoder, decoder = small()
    location, log_scale = 0.7, -0.4
    with torch.no_grad():
        decoder.get_parameter("blocks.output.conv.w").zero_()
        decoder.get_parameter("blocks.output.conv.b").copy_(torch.tensor([location] * 3 + [log_scale] * 3))
    cells = torch.linspace(0.1, 0.9, 801)[:-1] + 0.0005  # centres of cells of mapped pixels
    density = torch.tensor(
        [
            math.exp(
                -vae_loss(
                    encoder, decoder, torch.full((1, 3, 8, 8), (cell - 0.1) / 0.8), 1.0, 0.0, torch.Generator()
                ).reconstruction.item()
            )
            for cell in cells[::10].tolist()
        ]
    )
    logits = torch.tensor([0.1, 0.9]).logit()
    scale = math.exp(log_scale)
    laplace = torch.distributions.Laplace(location, scale)
    assert density.sum().item() * 0.01 == pytest.approx(
        (laplace.cdf(logits[1]) - laplace.cdf(logits[0])).item(), rel=0.01
    )


def test_the_divergence_is_zero_for_uniform_codes_and_log_codes_for_a_single_one() -> None:
    encoder, decoder = small()
    levels, generator = torch.rand(1, 3, 16, 16), torch.Generator().manual_seed(0)
    with torch.no_grad():
        encoder.get_parameter("blocks.output.conv.w").zero_()
    loss = vae_loss(encoder, decoder, levels, 1.0, 6.6, generator)
    assert abs(loss.divergence.item()) < 1e-5
    with torch.no_grad():
        encoder.get_parameter("blocks.output.conv.b")[5] = 100.0
    loss = vae_loss(encoder, decoder, levels, 1.0, 6.6, generator)
    assert loss.divergence.item() == pytest.approx(math.log(32))
    assert (loss.codes == 5).all() and loss.codes.shape == (1, 4)
    assert loss.total.item() == pytest.approx(loss.reconstruction.item() + 6.6 / 192 * math.log(32), rel=1e-5)


def test_the_flops_equal_the_counter_of_torch() -> None:
    for shape, size in ((SMALL, (16, 24)), (TokenizerConfig(), (112, 112))):
        with torch.device("meta"):
            encoder, images = Encoder(shape), torch.empty(1, shape.in_chans, *size)
        with FlopCounterMode(display=False) as counter:
            encoder(images)
        assert encoder.flops(*size) == counter.get_total_flops()
