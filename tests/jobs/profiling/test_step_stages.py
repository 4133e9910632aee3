"""Micro-batches that do not fit into memory are detected, and the largest that fits is found."""

from pathlib import Path

import pytest
import torch

from maelstream.jobs.profiling.step_stages import DeviceBatch, largest_fitting_batch, model_without_engine, step_rate
from maelstream.jobs.recipe import Recipe, RecipeError, resolve
from maelstream.model.mae import MAE

TINY = {
    "image_size": [16, 16],
    "patch_size": 8,
    "dim": 24,
    "depth": 1,
    "heads": 3,
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 3,
}


@pytest.fixture
def recipe() -> Recipe:
    return resolve({"model": TINY}, "a test")


@pytest.mark.parametrize("capacity", [0, 1, 2, 5, 11, 12])
def test_the_largest_batch_that_fits_is_found(capacity: int) -> None:
    def run(count: int) -> None:
        if count > capacity:
            raise torch.OutOfMemoryError

    assert largest_fitting_batch(run, 13) == capacity


def test_the_error_for_a_micro_batch_that_does_not_fit_names_the_largest_that_does(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MAE.forward

    def forward(self: MAE, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        if len(images) > 5:
            raise torch.OutOfMemoryError
        return original(self, images, keys)

    monkeypatch.setattr(MAE, "forward", forward)
    device = torch.device("cpu")
    model, batch = model_without_engine(recipe, None, device), DeviceBatch.random(12, recipe, device)
    with pytest.raises(RecipeError, match=r"micro_batch_size 12 does not fit.*the largest that does is 5: --engine"):
        step_rate(model, batch, device, 0.01)


def test_the_model_without_engine_has_the_dtypes_of_the_engine(recipe: Recipe, tmp_path: Path) -> None:
    model = model_without_engine(recipe, None, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
