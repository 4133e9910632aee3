"""What does not fit is found out, and the largest that does."""

from pathlib import Path

import pytest
import torch

from maelstream.jobs.profiling.step_stages import Images, bare_model, largest_that_fits, step_rate
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


@pytest.mark.parametrize("room", [0, 1, 2, 5, 11, 12])
def test_the_largest_that_fits_is_the_largest_that_fits(room: int) -> None:
    def run(count: int) -> None:
        if count > room:
            raise torch.OutOfMemoryError

    assert largest_that_fits(run, 13) == room


def test_a_micro_batch_that_does_not_fit_is_one_line_with_the_largest_that_does(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = MAE.forward

    def forward(self: MAE, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        if len(images) > 5:
            raise torch.OutOfMemoryError
        return whole(self, images, keys)

    monkeypatch.setattr(MAE, "forward", forward)
    device = torch.device("cpu")
    model, batch = bare_model(recipe, None, device), Images.made(12, recipe, device)
    with pytest.raises(RecipeError, match=r"micro_batch_size 12 does not fit.*the largest that does is 5: --engine"):
        step_rate(model, batch, device, 0.01)


def test_the_bare_model_has_the_engine_s_dtypes(recipe: Recipe, tmp_path: Path) -> None:
    model = bare_model(recipe, None, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
