"""Micro-batches that do not fit into memory are detected, and the largest that fits is found."""

from pathlib import Path

import pytest
import torch

from maelstream.jobs.profiling.step_stages import (
    DeviceBatch,
    largest_fitting_batch,
    model_without_engine,
    step_rate,
    time_engine,
)
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


class FakeEngine:
    """Runs the model as DeepSpeed's engine does, and takes 5 units of a clock for what the model takes 4."""

    def __init__(self, clock: "Clock", module: MAE):
        self.clock, self.module, self.device = clock, module, torch.device("cpu")

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.module(*batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.clock.pass_time(1)

    def step(self) -> None:
        self.clock.pass_time(2)


class Clock:
    """A machine that becomes a tenth slower with each forward pass."""

    def __init__(self) -> None:
        self.now, self.unit = 0.0, 1.0

    def pass_time(self, units: float) -> None:
        self.now += units * self.unit


def test_the_share_of_the_engine_is_that_of_turns_and_its_weights_are_used(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    device = torch.device("cpu")
    engine = FakeEngine(clock, model_without_engine(recipe, None, device))
    model = model_without_engine(recipe, None, device)
    original = MAE.forward

    def forward(self: MAE, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        clock.unit *= 1.1
        clock.pass_time(4)
        return original(self, images, keys)

    monkeypatch.setattr(MAE, "forward", forward)
    monkeypatch.setattr("maelstream.jobs.profiling.step_stages.time.perf_counter", lambda: clock.now)
    times = time_engine(engine, model, DeviceBatch.random(2, recipe, device), 1, 8)
    assert times.share == pytest.approx(1 - 1.1 * 4 / 5) and times.noise == pytest.approx(0.0)
    for mine, engines in zip(model.parameters(), engine.module.parameters(), strict=True):
        assert mine.data_ptr() == engines.data_ptr() and mine.grad is None


def test_the_engine_is_timed_without_a_model_too(recipe: Recipe) -> None:
    device = torch.device("cpu")
    engine = FakeEngine(Clock(), model_without_engine(recipe, None, device))
    times = time_engine(engine, None, DeviceBatch.random(2, recipe, device), 2, 2)
    assert times.share is None and times.noise is None and times.micro_batch_s > 0
