"""Profiles a recipe on every rank at the same time: each stage alone, then the run end to end, then the bottleneck.

The figures are a dictionary of plain values, the same that `maelstream profile --json` writes (docs/profiling.md).
"""

import gc
import math
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maelstream.jobs.distributed.ranks import ControlGroup, Ranks
from maelstream.jobs.format import format_decimal_bytes
from maelstream.jobs.hardware import (
    copy_bytes_per_s,
    datasheet_flops_per_s,
    matrix_flops_per_s,
    memory_bytes_per_s,
    update_bytes_per_s,
)
from maelstream.jobs.profiling.bottleneck import RunSetup, find_bottleneck
from maelstream.jobs.profiling.data_stages import DataPath, fits_in_page_cache, sequential_read_rate
from maelstream.jobs.profiling.end_to_end import EndToEndStats, measure_end_to_end
from maelstream.jobs.profiling.step_stages import (
    DeviceBatch,
    EngineTimes,
    all_reduce_s,
    check_memory,
    compute_dtype,
    copy_rate,
    model_without_engine,
    step_rate,
    time_engine,
)
from maelstream.jobs.recipe import Recipe, RecipeError
from maelstream.jobs.training.data import batch_split_of, open_data
from maelstream.jobs.training.engine import build_engine, build_model
from maelstream.model.flops import training_flops
from maelstream.model.mae import MAE
from maelstream.model.memory import update_bytes
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import STAGES
from maelstream.pipeline.decode import decode_device
from maelstream.pipeline.mix import Mix
from maelstream.shards.dataset import Dataset

VERSION = 1
"""Version of the format of the figures."""


class Stage(NamedTuple):
    """Rates of a stage when nothing else runs; None where the stage does not apply, and `why` then gives the reason."""

    images_per_s: float | None
    bytes_per_s: float | None = None
    limit_images_per_s: float | None = None
    why: str = ""
    """What sets the limit, or why the stage does not apply."""


class Machine(NamedTuple):
    """The machine of this rank: its name and cores, measured rates, and its data sheet's rate."""

    name: str
    cores: int
    matrix_flops_per_s: float
    matrix_dtype: str
    datasheet_flops_per_s: float | None
    memory_bytes_per_s: float
    """Copies: bytes read and written."""
    update_bytes_per_s: float
    """Updates in place: bytes read and written."""


def data_path_of(recipe: Recipe, ranks: Ranks, micro_batches: int | None = None) -> DataPath:
    """The data path of pre-training with this recipe.

    With `micro_batches`, a step has at most that many micro-batches, of the recipe's size.

    Raises:
        MaelstreamError: there is no data, or the dataset has fewer samples than the ranks take at once.
    """
    dataset, order = open_data(recipe.data, recipe.seed)
    batch_split = batch_split_of(recipe, ranks.world_size)
    if micro_batches is not None and micro_batches < batch_split.micro_batches:
        count = ranks.world_size * micro_batches
        batch_split = BatchSplit(batch_split.largest * count, ranks.world_size, micro_batches)
    if batch_split.largest * ranks.world_size > len(dataset):
        raise RecipeError(
            f"{dataset.folder} is too small to measure: {len(dataset)} samples, and the ranks take "
            f"{batch_split.largest * ranks.world_size} at once; lower --engine.micro-batch-size, or pack more images"
        )
    return DataPath(
        dataset,
        order,
        AugmentSampler(recipe.seed, recipe.data.crop, recipe.model.image_size),
        batch_split,
        ranks.rank,
        replace(recipe.loader, threads=recipe.loader.threads or ranks.threads),
    )


class StageProfiler:
    """Measures one stage after the other, on every rank at the same time."""

    def __init__(
        self, recipe: Recipe, target: PCATarget | TokenTarget | None, seconds: float, control_group: ControlGroup
    ):
        self.recipe, self.target, self.seconds, self.control_group = recipe, target, seconds, control_group
        self.data_path = data_path_of(recipe, control_group.ranks)
        # First of all, because it raises where there is no GPU.
        self.decode_device = decode_device(self.data_path.loader_config.decode)
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        with torch.device("meta"):
            model = build_model(recipe, None)
        self.parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        dtype = compute_dtype(model, recipe)
        name = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"
        self.machine = Machine(
            name,
            len(os.sched_getaffinity(0)),
            matrix_flops_per_s(dtype, self.device),
            str(dtype).removeprefix("torch."),
            datasheet_flops_per_s(name, "bf16" if dtype == torch.bfloat16 else "fp32"),
            memory_bytes_per_s(self.device),
            update_bytes_per_s(self.device),
        )
        self.stages: dict[str, Stage] = {}
        self.model: MAE | None = None
        """Without an engine; the stage `step` makes it."""

    def stage(self, name: str) -> Stage:
        """Measures storage, read, decode, augment, copy or step."""
        return {
            "storage": self._storage,
            "read": self._read,
            "decode": self._decode,
            "augment": self._augment,
            "copy": self._copy,
            "step": self._step,
        }[name]()

    def _storage(self) -> Stage:
        data_path, dataset = self.data_path, self.data_path.dataset
        if data_path.batch_plan is None:
            return Stage(None, why="a stream has no storage that could be read alone")
        rate = data_path.storage_rate(data_path.batch_plan, self.seconds)
        assert isinstance(dataset, Dataset | Mix)
        first = dataset if isinstance(dataset, Dataset) else dataset.datasets[0]
        cold, warm = sequential_read_rate(first)
        cached = fits_in_page_cache(first)
        why = f"sequential reads: {format_decimal_bytes(cold)}/s"
        why += f", {format_decimal_bytes(warm)}/s from the page cache, where the shards fit" if cached else ""
        limit = (warm if cached else cold) / data_path.bytes_per_image
        return Stage(rate, rate * data_path.bytes_per_image, limit, why)

    def _read(self) -> Stage:
        rate = self.data_path.read_rate(self.seconds)
        storage = self.stages["storage"].images_per_s if "storage" in self.stages else None
        return Stage(rate, rate * self.data_path.bytes_per_image, storage, "storage alone" if storage else "")

    def _decode(self) -> Stage:
        rate = self.data_path.decode_rate(self.seconds)
        return Stage(rate, rate * self.data_path.bytes_per_image, None, "the decoder's own rate")

    def _augment(self) -> Stage:
        rate, window_bytes = self.data_path.augment_rate(self.seconds)
        height, width = self.recipe.model.image_size
        moved = window_bytes + 3 * height * width
        memory = self.machine.memory_bytes_per_s if self.decode_device == self.device else None
        return Stage(rate, rate * moved, memory and memory / moved, "memory: reads a crop window, writes an image")

    def _copy(self) -> Stage:
        if self.device.type == "cpu":
            return Stage(None, why="the model is on the CPU, where images are decoded")
        if self.decode_device.type == "cuda":
            return Stage(None, why="images are decoded on the GPU")
        size = self.recipe.model.in_chans * math.prod(self.recipe.model.image_size)
        rate = copy_rate(self.data_path.batch_split.largest, self.recipe, self.device, self.seconds)
        return Stage(rate, rate * size, copy_bytes_per_s(self.device) / size, "copies from pinned memory")

    def _step(self) -> Stage:
        gc.collect()  # decoders are in reference cycles, and on a GPU they hold memory
        micro_batch = self.data_path.batch_split.largest
        if self.device.type == "cpu":
            check_memory(self.recipe, micro_batch, self.control_group.ranks)
        self.model = model_without_engine(self.recipe, self.target, self.device)
        rate = step_rate(
            self.model, DeviceBatch.random(micro_batch, self.recipe, self.device), self.device, self.seconds
        )
        limit = self.machine.matrix_flops_per_s / training_flops(self.recipe.model)
        return Stage(rate, None, limit, f"{self.machine.matrix_dtype} matrix products")

    def micro_batches(self, step_images_per_s: float) -> int:
        """The recipe's micro-batches per step, or fewer if such a step takes more than a quarter of the time."""
        (total,) = self.control_group.sums([step_images_per_s])
        per_second = total / self.control_group.ranks.world_size / self.data_path.batch_split.largest
        return min(self.data_path.batch_split.micro_batches, max(1, int(per_second * self.seconds / 4)))

    def optimizer(self, times: EngineTimes) -> Stage:
        """The optimizer's step, which comes once per batch of the recipe."""
        images = self.recipe.optim.batch_size / self.control_group.ranks.world_size
        moved = update_bytes(self.parameters, self.recipe.engine.zero, self.control_group.ranks.world_size)
        limit = None if self.recipe.engine.offload_optimizer else self.machine.update_bytes_per_s * images / moved
        why = f"memory, updated in place: {moved / self.parameters:.0f} bytes per parameter"
        return Stage(images / times.optimizer_s, moved / times.optimizer_s, limit, why)

    def comm(self) -> Stage:
        """The sum of gradients over ranks, as often per step as the ZeRO stage requires it."""
        if self.control_group.ranks.world_size == 1:
            return Stage(None, why="one rank")
        (once,) = self.control_group.sums([all_reduce_s(self.parameters, self.device, 1)])
        repeats = max(1, int(self.seconds * self.control_group.ranks.world_size / once))
        seconds = all_reduce_s(self.parameters, self.device, repeats)
        times = 1 if self.recipe.engine.zero == 1 else self.data_path.batch_split.micro_batches
        images = self.recipe.optim.batch_size / self.control_group.ranks.world_size
        return Stage(images / (times * seconds), 4 * self.parameters / seconds, None, "all-reduce of float32 gradients")


def profile_recipe(
    recipe: Recipe,
    target: PCATarget | TokenTarget | None,
    names: list[str],
    seconds: float,
    control_group: ControlGroup,
    trace: Path | None,
) -> dict[str, Any]:
    """Measures the stages `names` and returns all figures in the form of `--json`.

    Stages hold rates of all ranks together; times and memory of the run end to end are this rank's.
    """
    profiler = StageProfiler(recipe, target, seconds, control_group)
    stages, ranks = profiler.stages, control_group.ranks
    for name in names:
        if name not in ("optimizer", "comm"):
            stages[name] = profiler.stage(name)
    end_to_end, times, data_path = None, None, profiler.data_path
    if "step" in names or "optimizer" in names:
        bare = stages["step"] if "step" in names else profiler.stage("step")
        assert bare.images_per_s is not None
        data_path = data_path_of(recipe, ranks, profiler.micro_batches(bare.images_per_s))
        batch_split = data_path.batch_split
        engine = build_engine(recipe, batch_split, build_model(recipe, target))
        steps = max(3, int(seconds * control_group.sums([bare.images_per_s])[0] / batch_split.batch_size))
        batch = DeviceBatch.random(batch_split.largest, recipe, engine.device)
        model, profiler.model = profiler.model if recipe.engine.zero < 3 else None, None
        times = time_engine(engine, model, batch, batch_split.micro_batches, steps)
        if "optimizer" in names:
            stages["optimizer"] = profiler.optimizer(times)
        if "step" in names:
            end_to_end = measure_end_to_end(engine, data_path, control_group, batch_split.micro_batches, seconds, trace)
    if "comm" in names:
        stages["comm"] = profiler.comm()
    summed = {name: _summed(stages[name], control_group) for name in STAGES if name in stages}
    return figures_of(profiler, summed, data_path, times, end_to_end)


def figures_of(
    profiler: StageProfiler,
    stages: dict[str, Stage],
    data_path: DataPath,
    times: EngineTimes | None,
    end_to_end: EndToEndStats | None,
) -> dict[str, Any]:
    """The measured rates, what follows from them, and the bottleneck; `data_path` is the one measured end to end."""
    recipe, ranks, machine = profiler.recipe, profiler.control_group.ranks, profiler.machine
    flops, recipe_split = training_flops(recipe.model), profiler.data_path.batch_split
    peak = machine.matrix_flops_per_s * ranks.world_size
    figures: dict[str, Any] = {
        "version": VERSION,
        "recipe": "",
        "machine": machine._asdict(),
        "ranks": ranks.world_size,
        "micro_batch_size": recipe_split.largest,
        "micro_batches": {"recipe": recipe_split.micro_batches, "measured": data_path.batch_split.micro_batches},
        "bytes_an_image": data_path.bytes_per_image,
        "flops_an_image": flops,
        "stages": {name: stage._asdict() for name, stage in stages.items()},
        "whole": None,
    }
    step = stages["step"].images_per_s if "step" in stages else None
    if end_to_end is not None and times is not None and step is not None:
        measured_batch, recipe_batch = data_path.batch_split.batch_size, recipe.optim.batch_size
        # The recipe's batch spreads one optimizer step over more images than the measured batch.
        image_s = 1 / end_to_end.images_per_s + times.optimizer_s * (1 / recipe_batch - 1 / measured_batch)
        figures["whole"] = end_to_end._asdict() | {
            "images_per_s_with_the_recipe_s_batch": 1 / image_s,
            "bytes_per_s": end_to_end.images_per_s * data_path.bytes_per_image,
            "mfu_measured": end_to_end.images_per_s * flops / peak,
            "mfu_datasheet": machine.datasheet_flops_per_s
            and end_to_end.images_per_s * flops / (machine.datasheet_flops_per_s * ranks.world_size),
            "engine_images_per_s": recipe_split.largest * ranks.world_size / times.micro_batch_s,
            "engine_share": times.share,
            "engine_noise": times.noise,
        }
    rates = {name: stage.images_per_s for name, stage in stages.items() if stage.images_per_s is not None}
    if not rates:
        raise RecipeError(f"none of --stages {','.join(stages)} applies here; see `maelstream profile --help`")
    run_rate = figures["whole"]["images_per_s_with_the_recipe_s_batch"] if figures["whole"] else None
    bottleneck = find_bottleneck(rates, step and step * flops / peak, run_rate, _setup_of(profiler, data_path))
    figures["verdict"] = bottleneck._asdict() | {"advice": bottleneck.advice._asdict()}
    return figures


def _setup_of(profiler: StageProfiler, data_path: DataPath) -> RunSetup:
    recipe, ranks, dataset = profiler.recipe, profiler.control_group.ranks, data_path.dataset
    return RunSetup(
        on_gpu=profiler.device.type == "cuda",
        decodes_on_gpu=profiler.decode_device.type == "cuda",
        threads=data_path.loader_config.threads,
        cores=ranks.threads,
        world_size=ranks.world_size,
        local=isinstance(dataset, Dataset) and dataset.storage.local,
        shuffle=recipe.data.shuffle,
        dct_scaling=recipe.loader.decode.dct_scaling,
        hw_decoder_load=recipe.loader.decode.hw_decoder_load,
        prefetch=recipe.loader.prefetch,
        micro_batch_size=recipe.engine.micro_batch_size,
        batch_size=recipe.optim.batch_size,
        precision=recipe.engine.precision,
        zero=recipe.engine.zero,
        compile=recipe.engine.compile,
        activation_checkpointing=recipe.engine.activation_checkpointing,
        offload_optimizer=recipe.engine.offload_optimizer,
    )


def _summed(stage: Stage, control_group: ControlGroup) -> Stage:
    """The stage's rates summed over all ranks."""
    values = (stage.images_per_s, stage.bytes_per_s, stage.limit_images_per_s)
    sums = control_group.sums([value or 0.0 for value in values])
    rate, size, limit = (None if value is None else total for value, total in zip(values, sums, strict=True))
    return Stage(rate, size, limit, stage.why)
