"""What a run prints at its start and at its end."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.hardware import process_device
from maelstream.jobs.recipe import ClassificationRecipe, Recipe
from maelstream.jobs.training.schedule import Schedule
from maelstream.jobs.training.summary import already_there, end_summary, start_summary
from maelstream.model.config import MAEConfig
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.mix import Mix
from maelstream.pipeline.stream import Stream
from maelstream.shards.dataset import Dataset

SCHEDULE = Schedule(total_steps=1200, warmup_steps=0, peak_lr=1, min_lr=0)
RECIPE = Recipe(model=MAEConfig(dim=768, depth=12))


def summary(recipe: Recipe | ClassificationRecipe, datasets: dict, model: nn.Module, **changed: object) -> list[str]:
    """The lines of a start on 2 ranks with batches of 10 images."""
    values: dict = {
        "ranks": Ranks(0, 2, 0, 2),
        "batch_split": BatchSplit(10, 2, 2),
        "schedule": SCHEDULE,
        "step": 0,
        "last_step": 1200,
        "folder": Path("runs/one"),
    }
    return start_summary(recipe, datasets, model, **(values | changed)).splitlines()


def test_a_start_names_data_model_ranks_batch_steps_and_folder(packed: Dataset) -> None:
    title, *facts = summary(RECIPE, {"data": packed}, nn.Linear(9, 1))
    assert title == "maelstream pretrain"
    data, model, ranks, batch, steps, run = facts
    assert data == f"  data   60 samples, 3 classes, {packed.folder}"
    assert model == "  model  masked autoencoder, ViT-B/16, 224 x 224 px, 10 parameters"
    assert ranks.startswith("  ranks  2, ") and ranks.endswith(" each; ZeRO 1, bf16")
    assert ("CPU" in ranks) == (process_device().type == "cpu")
    assert batch == "  batch  10 images = 2 ranks x 2 or 3 images per micro-batch x 2 accumulated"
    assert (steps, run) == ("  steps  1,200, 800 epochs", "  run    runs/one")


def test_a_resumed_start_names_its_step_and_where_it_stops(packed: Dataset) -> None:
    lines = summary(RECIPE, {"data": packed}, nn.Linear(9, 1), step=400, last_step=500)
    assert "  steps  1,200, 800 epochs, resuming from step 400, stopping at step 500" in lines


def test_mixes_and_streams_are_described(packed: Dataset) -> None:
    mix, stream = Mix((packed, packed), (1.0, 2.0)), Stream("x-{0..3}.tar", 1_281_167)
    lines = summary(RECIPE, {"train": mix, "val": stream}, nn.Linear(9, 1))
    assert lines[1] == f"  train  120 samples in 2 datasets, {packed.folder} + {packed.folder}"
    assert lines[2] == "  val    1,281,167 samples in 4 shards that are streamed, x-{0..3}.tar"


def test_a_classifier_names_its_weights_and_what_it_trains(packed: Dataset) -> None:
    model = nn.Sequential(nn.Linear(2000, 1000).requires_grad_(False), nn.Linear(9, 1))
    recipe = ClassificationRecipe(job="linprobe", weights="runs/mae", weights_step=1200)
    lines = summary(recipe, {"train": packed, "val": packed}, model)
    assert lines[0] == "maelstream linprobe" and lines[1][:9] == "  train  " and lines[2][:9] == "  val    "
    name, trained = "  model  ViT-B/16, 1,000 classes, 224 x 224 px, 2.0 M parameters", "10 of them trained"
    assert lines[3] == f"{name}, {trained}, from runs/mae (step 1,200)"


def test_the_end_names_time_rate_and_the_next_commands() -> None:
    recipe = replace(RECIPE, optim=replace(RECIPE.optim, batch_size=100))
    finished = end_summary(recipe, Path("my runs/one"), 200, 1200, 1200, 50.0, "")
    assert finished.startswith(
        "maelstream pretrain: finished my runs/one: 1,000 steps in 50 s, 2,000 images/s\n"
        "  next   maelstream reconstruct 'my runs/one'\n"
    )
    assert "maelstream finetune 'my runs/one' TRAIN VAL" in finished
    stopped = end_summary(recipe, Path("one"), 200, 300, 1200, 7200.0, "SIGTERM")
    assert "stopped by SIGTERM at step 300 of 1,200 (100 steps in 2.0 h, 1 images/s)" in stopped
    assert "\n" not in stopped
    labels = end_summary(ClassificationRecipe(), Path("one"), 0, 9, 9, 9.0, "")
    assert "maelstream evaluate one VAL" in labels and "reconstruct" not in labels


def test_a_run_that_has_nothing_to_do_says_why() -> None:
    done = already_there(RECIPE, Path("one"), 1200, 1200)
    assert done.startswith("maelstream pretrain: one is finished already (1,200 steps)") and "report one" in done
    assert "one is at step 6 of 1,200, so --stop-at-step leaves no step to take" in already_there(
        RECIPE, Path("one"), 6, 1200
    )


def test_warnings_of_deepspeed_and_of_torch_s_search_for_cuda_are_not_printed() -> None:
    code = """
from maelstream.jobs.distributed import ranks
import logging, torch.utils.cpp_extension
from deepspeed.utils import logger
logger.warning("from deepspeed")
logger.error("an error")
"""
    environment = os.environ | {"CUDA_HOME": "toolkit", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and "an error" in printed
    assert "from deepspeed" not in printed and "No CUDA runtime" not in printed


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_that_zero_3_partitions_are_counted_whole(packed: Dataset, stage: int) -> None:
    model = nn.Linear(99, 10)
    if stage == 3:  # what DeepSpeed leaves of a parameter on each rank
        setattr(model.weight, "ds_numel", 990)  # noqa: B010
        model.weight.data = model.weight.data.new_empty(0)
    assert "1,000 parameters" in summary(RECIPE, {"data": packed}, model)[2]
