"""The forward pass on CUDA, tried on fake tensors: no tensor stays on the CPU, and nothing waits for the GPU.

A fake tensor has a device and a shape, but no contents. So a CPU tensor that meets one on CUDA is an error, and so is
any operator that must read contents on the host: `.item()`, `nonzero`, a boolean index.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from benchmarks.fake_tensors import fake_mae
from maelstream.model.config import MAEConfig
from maelstream.model.mae import MAE
from maelstream.model.sizes import PAPER_SIZES

B16 = MAEConfig()
CONFIGS = {name: MAEConfig(**size._asdict()) for name, size in PAPER_SIZES.items()} | {
    "block": dataclasses.replace(B16, depth=1, mask="block", mask_ratio=0.5),
    "grid": dataclasses.replace(B16, depth=1, mask="grid"),
    "pixel": dataclasses.replace(B16, depth=1, target="pixel"),
    "encoder mask tokens": dataclasses.replace(B16, depth=1, encoder_mask_tokens=True),
    "448 px": dataclasses.replace(B16, depth=1, image_size=(448, 448), patch_size=14),
}


def forward(config: MAEConfig, patch: Any = None) -> torch.Tensor:
    mode = FakeTensorMode()
    model = fake_mae(config, "cuda", torch.bfloat16, mode)
    if patch:
        patch(model)
    with mode:
        images = torch.empty(4, 3, *config.image_size, dtype=torch.uint8, device="cuda")
        return model(images, torch.empty(4, dtype=torch.int64, device="cuda"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_forward_pass_stays_on_the_gpu_and_never_waits_for_it(config: MAEConfig) -> None:
    loss = forward(config)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == ()


def test_features_stay_on_the_gpu() -> None:
    mode = FakeTensorMode()
    model = fake_mae(dataclasses.replace(B16, depth=2), "cuda", torch.bfloat16, mode)
    with mode:
        features = model.encode(torch.empty(4, 3, 224, 224, dtype=torch.uint8, device="cuda"))
    assert features.device.type == "cuda" and features.shape == (4, 197, 768)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda images: images + torch.ones(224), (RuntimeError, AssertionError)),  # a tensor on the CPU
        (lambda images: images if images.sum() > 0 else -images, DataDependentOutputException),  # waits for a number
        (lambda images: images[images > 0].mean() + images, DynamicOutputShapeException),  # waits for a shape
    ],
    ids=["device", "number", "shape"],
)
def test_what_these_tests_look_for_is_found(fault: Any, error: Any) -> None:
    def patch(model: MAE) -> None:
        loss = model.loss
        model.loss = lambda images, mask: loss(fault(images), mask)  # type: ignore[method-assign]

    with pytest.raises(error):
        forward(dataclasses.replace(B16, depth=1), patch)
