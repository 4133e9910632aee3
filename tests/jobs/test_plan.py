"""`maelstream plan`: state and traffic equal those of real engines on two ranks; steps, bottlenecks and errors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.plan import (
    MICRO_BATCHES,
    ODD,
    RANKS,
    Collectives,
    engines,
    lasting_bytes,
    predicted_state,
    storages_alive,
)
from maelstream.jobs.command import run
from maelstream.jobs.hardware import DEVICES, Device
from maelstream.jobs.plan import (
    MODELS,
    PlannedRun,
    Step,
    micro_batches_per_step,
    parse_count,
    predict_memory,
    predict_step,
)
from maelstream.jobs.recipe import RecipeError
from maelstream.model.memory import traffic
from tests.helpers.forked import CONTEXT

RUN = PlannedRun(MODELS["vit-l16"], 8, 1, 4096, False, 1e9, 110_000, None)


@pytest.fixture(scope="module")
def found() -> dict[int, dict[str, Any]]:
    return engines(ODD, CONTEXT)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_predicted_state_equals_a_real_engine_s_to_the_byte(found: dict[int, dict[str, Any]], stage: int) -> None:
    assert predicted_state(ODD, stage) == found[stage]["state"]


def test_a_tensor_at_the_address_of_a_freed_one_is_counted() -> None:
    first = torch.zeros(1000)
    before = storages_alive()
    del first
    second = torch.zeros(1000)
    assert second.nbytes in lasting_bytes(before)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_predicted_traffic_equals_a_real_engine_s_to_the_byte(found: dict[int, dict[str, Any]], stage: int) -> None:
    predicted = traffic(ODD, stage, RANKS, MICRO_BATCHES)
    assert dict(zip(Collectives.NAMES, predicted, strict=True)) == found[stage]["traffic"]


def test_compute_and_communication_alternate_and_data_overlap_with_both() -> None:
    step = Step(products=1.0, moves=0.25, optimizer=0.25, communication=0.5, decode=1.5, storage=None)
    assert (step.seconds, step.bound) == (2.0, "compute")
    assert step._replace(communication=3.0).bound == "communication"
    slow = step._replace(storage=4.0)
    assert (slow.seconds, slow.bound) == (4.0, "storage")
    assert step._replace(decode=2.0).bound == "decode"


def test_an_unknown_part_is_never_the_bottleneck() -> None:
    step = Step(1.0, 0.0, 0.0, None, None, None)
    assert (step.seconds, step.bound) == (1.0, "compute")


def test_twice_the_gpus_halve_the_arithmetic_and_activation_checkpointing_adds_a_fifth() -> None:
    one, two = (predict_step(RUN._replace(ranks=ranks), DEVICES["h100"], 8) for ranks in (8, 16))
    assert one.products == pytest.approx(2 * two.products) and one.decode == pytest.approx(2 * (two.decode or 0))
    saving = predict_step(RUN._replace(checkpointing=True), DEVICES["h100"], 8)
    assert saving.products / one.products == pytest.approx(1.2, abs=0.05)


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    device = Device("x", 1e15, 8e10, 3e12, node=8, link_bytes_per_s=400.0, network_bytes_per_s=10.0, bandwidth_share=1)
    assert device.ring_bytes_per_s(8) == 400 and device.ring_bytes_per_s(16) == 80
    assert Device("x", 1e15, 8e10, 3e12).ring_bytes_per_s(2) is None


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    device = DEVICES["h100"]
    memory = predict_memory(RUN, device, 1, False)
    free = device.memory_bytes - 4e9 - sum(memory.state)
    assert memory.largest * memory.image <= free < (memory.largest + 1) * memory.image
    assert predict_memory(RUN, device, 1, True).largest > 5 * memory.largest


def test_a_step_has_as_many_micro_batches_as_in_training() -> None:
    assert micro_batches_per_step(RUN, 512) == 1 and micro_batches_per_step(RUN, 511) == 2
    assert micro_batches_per_step(RUN._replace(ranks=3), 64) == math.ceil(1366 / 64)


def test_the_command_prints_memory_step_rate_hours_and_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "vit-h14", "--gpus", "256", "--gpu", "h100", "--dataset-size", "1.28M"]
    assert run("plan", options) == 0
    printed = capsys.readouterr().out
    for word in (
        "ZeRO 3",
        "largest micro-batch",
        "images/s",
        "GB/s from storage",
        "hours",
        "bottleneck: communication",
    ):
        assert word in " ".join(printed.split())


def test_the_assumed_rates_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", ["--gpu", "h100", "--decode-images-per-s", "5000", "--storage-gb-per-s", "3"]) == 0
    printed = " ".join(capsys.readouterr().out.partition("assumed:")[2].split())
    device = DEVICES["h100"]
    assert f"matrix products at {device.matrix_share:.0%} of 989.4 TFLOP/s" in printed
    assert f"memory at {device.bandwidth_share:.0%} of 3,350 GB/s, 4.00 GB of it reserved" in printed
    assert "decoding 5,000 images/s per GPU (--decode-images-per-s); storage 3 GB/s (--storage-gb-per-s)" in printed


def test_json_output_has_every_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("model: {dim: 192, depth: 12, heads: 3}\n")
    options = ["--model", str(recipe), "--gpus", "1", "--dataset-size", "5B", "--epochs", "2", "--json"]
    assert run("plan", [*options, "--storage-gb-per-s", "0.011"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["bound"] == "storage" and figures["images_per_s"] == pytest.approx(100)
    assert figures["hours"] == pytest.approx(1e10 / 100 / 3600)


@pytest.mark.parametrize(
    ("text", "count"), [("1.28M", 1.28e6), ("400m", 4e8), ("5B", 5e9), ("50k", 5e4), ("1281167", 1281167)]
)
def test_dataset_sizes_have_suffixes(text: str, count: float) -> None:
    assert parse_count(text) == pytest.approx(count)


@pytest.mark.parametrize("text", ["", "M", "3Q", "-1M", "0", "nan", "inf"])
def test_text_that_is_not_a_size_is_an_error(text: str) -> None:
    with pytest.raises(RecipeError, match="write it as"):
        parse_count(text)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpu", "v1"], "is not one of b200, h200, h100, a100, here"),
        (["--model", "vit-g"], "nor a recipe"),
        (["--gpus", "5000"], "cannot be split over 5000 GPUs"),
        (["--gpus", "0"], "--gpus 0 must be positive"),
        (["--model", "vit-h14", "--micro-batch-size", "4096"], "fits micro-batches up to"),
    ],
)
def test_bad_options_print_one_line(capsys: pytest.CaptureFixture[str], options: list[str], complaint: str) -> None:
    assert run("plan", options) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
