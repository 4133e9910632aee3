"""What `maelstream profile` measures, on every rank at the same time: stages alone, the whole, and what follows.

The figures are a dictionary of plain values, as its `--json` has them (docs/profiling.md).
"""

import gc
import math
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maelstream.jobs.distributed.ranks import ControlGroup, Ranks
from maelstream.jobs.hardware import copy_bytes_per_s, datasheet_flops_per_s, matrix_flops_per_s, memory_bytes_per_s
from maelstream.jobs.profiling.bottleneck import Situation, verdict
from maelstream.jobs.profiling.data_stages import Streamed, fits_in_memory, sequential
from maelstream.jobs.profiling.end_to_end import Whole, run_whole
from maelstream.jobs.profiling.step_stages import (
    ADAMW_BYTES,
    EngineTimes,
    Images,
    all_reduce_s,
    arithmetic,
    bare_model,
    check_memory,
    copy_rate,
    engine_times,
    step_rate,
)
from maelstream.jobs.recipe import Recipe, RecipeError
from maelstream.jobs.training.data import batch_split_of, open_data
from maelstream.jobs.training.engine import build_engine, build_model
from maelstream.model.flops import training_flops
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.mix import Mix
from maelstream.pipeline.tracing import STAGES
from maelstream.shards.dataset import Dataset

VERSION = 1
"""Of the figures' form."""


class Stage(NamedTuple):
    """What a stage does when nothing else runs; None where it does not apply, and `why` then says so."""

    images_per_s: float | None
    bytes_per_s: float | None = None
    limit_images_per_s: float | None = None
    why: str = ""
    """What sets the limit."""


class Machine(NamedTuple):
    """What is measured of the machine, on rank 0, and known of it."""

    name: str
    cores: int
    matrix_flops_per_s: float
    matrix_dtype: str
    datasheet_flops_per_s: float | None
    memory_bytes_per_s: float


def streamed_by(recipe: Recipe, ranks: Ranks, micro_batches: int | None = None) -> Streamed:
    """What pre-training would stream; with steps of so many micro-batches, if told, of the recipe's size.

    Raises:
        MaelstreamError: no data, or fewer samples than a step takes.
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
    return Streamed(
        dataset,
        order,
        AugmentSampler(recipe.seed, recipe.data.crop, recipe.model.image_size),
        batch_split,
        ranks.rank,
        recipe.loader.threads or ranks.threads,
        recipe.loader.prefetch,
        recipe.loader.decode,
    )


class Measurement:
    """Measures one stage after the other, on every rank at the same time."""

    def __init__(
        self, recipe: Recipe, target: PCATarget | TokenTarget | None, seconds: float, control_group: ControlGroup
    ):
        self.recipe, self.target, self.seconds, self.control_group = recipe, target, seconds, control_group
        self.streamed = streamed_by(recipe, control_group.ranks)
        self.decodes_on = self.streamed.decode.device  # at once: it complains of a GPU that is not there
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        with torch.device("meta"):
            model = build_model(recipe, None)
        self.parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        dtype = arithmetic(model, recipe)
        name = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"
        self.machine = Machine(
            name,
            len(os.sched_getaffinity(0)),
            matrix_flops_per_s(dtype, self.device),
            str(dtype).removeprefix("torch."),
            datasheet_flops_per_s(name, dtype),
            memory_bytes_per_s(self.device),
        )
        self.stages: dict[str, Stage] = {}

    def stage(self, name: str) -> Stage:
        """One of storage, read, decode, augment, copy, step."""
        return {
            "storage": self._storage,
            "read": self._read,
            "decode": self._decode,
            "augment": self._augment,
            "copy": self._copy,
            "step": self._step,
        }[name]()

    def _storage(self) -> Stage:
        streamed, dataset = self.streamed, self.streamed.dataset
        if streamed.line is None:
            return Stage(None, why="a stream has no place that could be read alone")
        rate = streamed.storage_rate(streamed.line, self.seconds)
        assert isinstance(dataset, Dataset | Mix)
        first = dataset if isinstance(dataset, Dataset) else dataset.datasets[0]
        cold, again = sequential(first)
        cached = fits_in_memory(first)
        why = f"read from end to end: {shown_size(cold)}/s"
        why += f", from the page cache {shown_size(again)}/s: it fits" if cached else ""
        limit = (again if cached else cold) / streamed.bytes_an_image
        return Stage(rate, rate * streamed.bytes_an_image, limit, why)

    def _read(self) -> Stage:
        rate = self.streamed.read_rate(self.seconds)
        storage = self.stages["storage"].images_per_s if "storage" in self.stages else None
        return Stage(rate, rate * self.streamed.bytes_an_image, storage, "storage alone" if storage else "")

    def _decode(self) -> Stage:
        rate = self.streamed.decode_rate(self.seconds)
        return Stage(rate, rate * self.streamed.bytes_an_image, None, "the decoder's own rate")

    def _augment(self) -> Stage:
        rate, window_bytes = self.streamed.augment_rate(self.seconds)
        height, width = self.recipe.model.image_size
        moved = window_bytes + 3 * height * width
        memory = self.machine.memory_bytes_per_s if self.decodes_on == self.device else None
        return Stage(rate, rate * moved, memory and memory / moved, "memory: a window read, an image written")

    def _copy(self) -> Stage:
        if self.device.type == "cpu":
            return Stage(None, why="the model is on the CPU, where images are decoded")
        if self.decodes_on.type == "cuda":
            return Stage(None, why="images are decoded on the GPU")
        size = self.recipe.model.in_chans * math.prod(self.recipe.model.image_size)
        rate = copy_rate(self.streamed.batch_split.largest, self.recipe, self.device, self.seconds)
        return Stage(rate, rate * size, copy_bytes_per_s(self.device) / size, "from pinned memory")

    def _step(self) -> Stage:
        gc.collect()  # decoders hold themselves in circles, and on a GPU memory with them
        if self.device.type == "cpu":
            check_memory(self.recipe, self.streamed.batch_split.largest, self.control_group.ranks)
        model = bare_model(self.recipe, self.target, self.device)
        batch = Images.made(self.streamed.batch_split.largest, self.recipe, self.device)
        rate = step_rate(model, batch, self.device, self.seconds)
        limit = self.machine.matrix_flops_per_s / training_flops(self.recipe.model)
        return Stage(rate, None, limit, f"products of {self.machine.matrix_dtype} matrices")

    def micro_batches(self, step_images_per_s: float) -> int:
        """As many as the recipe has, or as a step of a quarter of the time has."""
        (total,) = self.control_group.sums([step_images_per_s])
        a_second = total / self.control_group.ranks.world_size / self.streamed.batch_split.largest
        return min(self.streamed.batch_split.micro_batches, max(1, int(a_second * self.seconds / 4)))

    def optimizer(self, times: EngineTimes) -> Stage:
        """Once a step of the recipe's batch."""
        share = self.recipe.optim.batch_size / self.control_group.ranks.world_size
        moved = ADAMW_BYTES * self.parameters / self.control_group.ranks.world_size  # ZeRO: a rank updates its part
        limit = None if self.recipe.engine.offload_optimizer else self.machine.memory_bytes_per_s * share / moved
        why = f"memory: {ADAMW_BYTES} bytes a parameter"
        return Stage(share / times.optimizer_s, moved / times.optimizer_s, limit, why)

    def comm(self) -> Stage:
        """The gradients' sum, as often as the stage of ZeRO has it."""
        if self.control_group.ranks.world_size == 1:
            return Stage(None, why="one rank")
        (once,) = self.control_group.sums([all_reduce_s(self.parameters, self.device, 1)])
        repeats = max(1, int(self.seconds * self.control_group.ranks.world_size / once))
        seconds = all_reduce_s(self.parameters, self.device, repeats)
        times = 1 if self.recipe.engine.zero == 1 else self.streamed.batch_split.micro_batches
        share = self.recipe.optim.batch_size / self.control_group.ranks.world_size
        return Stage(share / (times * seconds), 4 * self.parameters / seconds, None, "all-reduce of float32 gradients")


def measure(
    recipe: Recipe,
    target: PCATarget | TokenTarget | None,
    names: list[str],
    seconds: float,
    control_group: ControlGroup,
    trace: Path | None,
) -> dict[str, Any]:
    """All figures, as the JSON has them; the same on every rank but for what is said to be one rank's."""
    measurement = Measurement(recipe, target, seconds, control_group)
    stages, ranks = measurement.stages, control_group.ranks
    for name in names:
        if name not in ("optimizer", "comm"):
            stages[name] = measurement.stage(name)
    whole, times, streamed = None, None, measurement.streamed
    if "step" in names or "optimizer" in names:
        bare = stages["step"] if "step" in names else measurement.stage("step")
        assert bare.images_per_s is not None
        streamed = streamed_by(recipe, ranks, measurement.micro_batches(bare.images_per_s))
        batch_split = streamed.batch_split
        engine = build_engine(recipe, batch_split, build_model(recipe, target))
        steps = max(3, int(seconds * control_group.sums([bare.images_per_s])[0] / batch_split.batch_size))
        batch = Images.made(batch_split.largest, recipe, engine.device)
        times = engine_times(engine, batch, batch_split.micro_batches, steps)
        if "optimizer" in names:
            stages["optimizer"] = measurement.optimizer(times)
        if "step" in names:
            whole = run_whole(engine, streamed, control_group, batch_split.micro_batches, seconds, trace)
    if "comm" in names:
        stages["comm"] = measurement.comm()
    summed = {name: _summed(stages[name], control_group) for name in STAGES if name in stages}
    return figures_of(measurement, summed, streamed, times, whole)


def figures_of(
    measurement: Measurement,
    stages: dict[str, Stage],
    streamed: Streamed,
    times: EngineTimes | None,
    whole: Whole | None,
) -> dict[str, Any]:
    """What was measured, and what follows from it."""
    recipe, ranks, machine = measurement.recipe, measurement.control_group.ranks, measurement.machine
    flops, recipe_slices = training_flops(recipe.model), measurement.streamed.batch_split
    peak = machine.matrix_flops_per_s * ranks.world_size
    figures: dict[str, Any] = {
        "version": VERSION,
        "recipe": "",
        "machine": machine._asdict(),
        "ranks": ranks.world_size,
        "micro_batch_size": recipe_slices.largest,
        "micro_batches": {"recipe": recipe_slices.micro_batches, "measured": streamed.batch_split.micro_batches},
        "bytes_an_image": streamed.bytes_an_image,
        "flops_an_image": flops,
        "stages": {name: stage._asdict() for name, stage in stages.items()},
        "whole": None,
    }
    step = stages["step"].images_per_s if "step" in stages else None
    if whole is not None and times is not None and step is not None:
        measured, asked = streamed.batch_split.batch_size, recipe.optim.batch_size
        spread_s = 1 / whole.images_per_s + times.optimizer_s * (1 / asked - 1 / measured)
        with_engine = recipe_slices.largest * ranks.world_size / times.micro_batch_s
        figures["whole"] = whole._asdict() | {
            "images_per_s_with_the_recipe_s_batch": 1 / spread_s,
            "bytes_per_s": whole.images_per_s * streamed.bytes_an_image,
            "mfu_measured": whole.images_per_s * flops / peak,
            "mfu_datasheet": machine.datasheet_flops_per_s
            and whole.images_per_s * flops / (machine.datasheet_flops_per_s * ranks.world_size),
            "engine_images_per_s": with_engine,
            "engine_share": 1 - with_engine / step,
        }
    dataset = streamed.dataset
    situation = Situation(
        on_gpu=measurement.device.type == "cuda",
        decodes_on_gpu=measurement.decodes_on.type == "cuda",
        threads=streamed.threads,
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
    rates = {name: stage.images_per_s for name, stage in stages.items() if stage.images_per_s is not None}
    if not rates:
        raise RecipeError(f"none of --stages {','.join(stages)} applies here; see `maelstream profile --help`")
    spread = figures["whole"]["images_per_s_with_the_recipe_s_batch"] if figures["whole"] else None
    told = verdict(rates, step and step * flops / peak, spread, situation)
    figures["verdict"] = told._asdict() | {"advice": told.advice._asdict()}
    return figures


def _summed(stage: Stage, control_group: ControlGroup) -> Stage:
    """Over all ranks."""
    values = (stage.images_per_s, stage.bytes_per_s, stage.limit_images_per_s)
    sums = control_group.sums([value or 0.0 for value in values])
    rate, size, limit = (None if value is None else total for value, total in zip(values, sums, strict=True))
    return Stage(rate, size, limit, stage.why)


def shown_size(count: float) -> str:
    """Of bytes, in a unit that suits."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
