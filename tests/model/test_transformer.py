"""Parts of the transformer: initialisation as in the paper, choice of the attention kernel."""

import math

import pytest
import torch
from timm.models.vision_transformer import Attention

from maelstream.model.config import AttentionKind, MAEConfig
from maelstream.model.mae import MAE
from maelstream.model.transformer import PatchProjection, choose_attention

CONFIG = MAEConfig(image_size=(32, 32), dim=192, depth=2, heads=3, decoder_dim=128, decoder_depth=1, decoder_heads=4)


def test_all_parameters_start_as_in_the_paper() -> None:
    for name, parameter in MAE(CONFIG, seed=5).named_parameters():
        if name.endswith("_token"):
            assert 0.015 < parameter.std() < 0.025, name
        elif parameter.ndim > 1:
            fan_out, fan_in = parameter.flatten(1).shape  # a patch kernel counts as a matrix
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert 0.99 * bound < parameter.abs().max() <= bound, name
            assert abs(parameter.std() / (bound / math.sqrt(3)) - 1) < 0.02, name
            assert abs(parameter.mean()) < 5 * bound / math.sqrt(3 * parameter.numel()), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_layer_norms_have_the_epsilon_of_the_reference() -> None:
    norms = [module for module in MAE(CONFIG).modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 3 + 2
    assert {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize(
    ("kind", "device", "dtype", "fused"),
    [
        ("auto", "cuda", torch.float32, True),
        ("auto", "cuda", torch.bfloat16, True),
        ("auto", "cpu", torch.float32, True),
        ("auto", "cpu", torch.bfloat16, False),
        ("sdpa", "cpu", torch.bfloat16, True),
        ("math", "cuda", torch.float32, False),
    ],
)
def test_attention_depends_on_device_and_dtype(
    kind: AttentionKind, device: str, dtype: torch.dtype, fused: bool
) -> None:
    model = MAE(CONFIG).to(dtype)
    choose_attention(model, kind, torch.device(device))
    assert {module.fused_attn for module in model.modules() if isinstance(module, Attention)} == {fused}


def test_attention_follows_a_cast_of_the_model() -> None:
    model = MAE(CONFIG)
    assert all(module.fused_attn for module in model.modules() if isinstance(module, Attention))
    assert not any(module.fused_attn for module in model.bfloat16().modules() if isinstance(module, Attention))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_attention_follows_the_model_to_the_gpu_and_back() -> None:
    model = MAE(CONFIG).bfloat16()
    assert all(module.fused_attn for module in model.cuda().modules() if isinstance(module, Attention))
    assert not any(module.fused_attn for module in model.cpu().modules() if isinstance(module, Attention))


def test_a_projection_accepts_patches_of_any_float_dtype() -> None:
    projection = PatchProjection(3, 8, 2)
    torch.nn.init.normal_(projection.weight)
    torch.nn.init.zeros_(projection.bias)
    patches = torch.randn(1, 4, 12)
    assert projection.bfloat16()(patches).dtype == torch.bfloat16
    assert projection.double()(patches).dtype == torch.float64
