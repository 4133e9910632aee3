"""The training parts of `make gpu-check`: runs stopped and resumed at each ZeRO stage, and rates of the models."""

import dataclasses
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.gpu_part import CannotRun, Row, Setting, last_words
from maelstream.jobs.distributed.ranks import process_group, ranks_from_environment
from maelstream.jobs.format import format_decimal_bytes
from maelstream.jobs.profiling.stage_profiler import profile_recipe
from maelstream.jobs.recipe import Recipe, RecipeError, load_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import Dataset

STEPS, STOP = 8, 3
STAGES = (1, 2, 3)
RUNS = {"once": "", "again": "the same run once more", "resumed": f"stopped at step {STOP} and resumed"}
# Required of one H100, with the loader; MFU of the measured rate of matrix products. Rates of others are only reported.
MFU = {"L/16": 0.5, "H/14": 0.55}
IMAGES_PER_S = {"B/16": 6000.0}
DATA_WAIT, ENGINE_SHARE = 0.01, {"H/14": 0.03}
TRACED = "B/16"


class Running(Protocol):
    """A process that was started."""

    def wait(self) -> int: ...


def start(arguments: list[str], log: Path) -> Running:
    """Starts `maelstream pretrain` on one rank."""
    with log.open("wb") as file:
        command = [sys.executable, "-X", "faulthandler", "-m", "maelstream.jobs.pretrain", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=file)


def resume(setting: Setting) -> list[Row]:
    """Trains one rank at each ZeRO stage: once, once more, and once stopped and resumed.

    Each run is a process. They run at the same time, because most of the time goes into their start.
    """
    folders = {(stage, name): fresh(Path(setting.work) / f"zero{stage}-{name}") for stage in STAGES for name in RUNS}

    def train_to_step(names: tuple[str, ...], step: int) -> dict[tuple[int, str], str]:
        """Trains the runs `names` up to `step`; returns why each failed, or an empty string."""
        running = {}
        for (stage, name), folder in folders.items():
            if name in names:
                settings = {"data.dataset": setting.dataset, "engine.zero": stage, "log.every-steps": 1}
                settings |= {"loader.threads": 1, "run": folder, "stop-at-step": step}
                options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
                running[stage, name] = start([setting.recipes["demo"], *options], folder.with_suffix(".log"))
        codes = {key: process.wait() for key, process in running.items()}
        logs = {key: folders[key].with_suffix(".log").read_text(errors="replace") for key in codes}
        return {key: last_words(logs[key], code, "") if code else "" for key, code in codes.items()}

    failures = train_to_step(("once", "again"), STEPS)
    first = train_to_step(("resumed",), STOP)
    second = train_to_step(("resumed",), STEPS)
    failures |= {key: first[key] or second[key] for key in first}
    return [row for stage in STAGES for row in rows_of_runs(stage, folders, failures)]


def rows_of_runs(
    stage: int, folders: dict[tuple[int, str], Path], failures: dict[tuple[int, str], str]
) -> Iterator[Row]:
    """Rows of one ZeRO stage: whether it trains, and whether the other runs took the same steps."""
    once, what = RunFolder(folders[stage, "once"]), f"ZeRO {stage}, {STEPS} steps"
    if reason := failures[stage, "once"]:
        yield Row(what, "finite losses", reason, False, {})
        return
    losses = [line["loss"] for line in once.read_metrics()]
    sound = len(losses) == STEPS and all(loss is not None and math.isfinite(loss) for loss in losses)
    yield Row(what, "finite losses", f"{losses[0]:.4f} -> {losses[-1]:.4f}" if sound else f"{losses}", sound, {})
    for name, what in RUNS.items():
        if name != "once":
            reason = failures[stage, name] or difference_of(once, RunFolder(folders[stage, name]))
            found = reason or "losses, norms and weights equal"
            yield Row(f"ZeRO {stage}, {what}", "bit-identical", found, not reason, {})


def fresh(folder: Path) -> Path:
    """Removes the folder of an earlier check and returns its path."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def difference_of(one: RunFolder, other: RunFolder) -> str:
    """The first difference of two runs; empty if there is none."""
    steps = ([(line["step"], line["loss"], line["grad_norm"]) for line in run.read_metrics()] for run in (one, other))
    for ours, theirs in zip(*steps, strict=True):
        if ours != theirs:
            return f"step {ours[0]}: loss {ours[1]} and {theirs[1]}, norm {ours[2]} and {theirs[2]}"
    weights, others = one.checkpoints.weights(STEPS), other.checkpoints.weights(STEPS)
    differing = [name for name in weights if not torch.equal(weights[name], others[name])]
    return f"{len(differing)} of {len(weights)} tensors, {differing[0]} among them" if differing else ""


def recipe_of(setting: Setting, name: str) -> Recipe:
    """The model's recipe with a micro-batch for a large GPU, and a batch no larger than the dataset."""
    recipe, count = load_recipe(Path(setting.recipes[name])), len(Dataset.open(setting.dataset))
    micro = min(setting.micro_batches[name], count)
    batch_size = max(1, min(recipe.optim.batch_size, count) // micro) * micro
    decode = dataclasses.replace(recipe.loader.decode, on="gpu" if setting.device == "cuda" else "cpu")
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, dataset=setting.dataset),
        optim=dataclasses.replace(recipe.optim, batch_size=batch_size),
        engine=dataclasses.replace(recipe.engine, micro_batch_size=micro, compile=setting.compile),
        loader=dataclasses.replace(recipe.loader, decode=decode),
    )


def rates(setting: Setting, name: str) -> list[Row]:
    """Rows for the step alone, in DeepSpeed's engine, and with the loader: `maelstream profile --stages step`."""
    return rows_of_figures(name, profiled(setting, name, None))


def trace(setting: Setting) -> list[Row]:
    """Writes a trace of three steps with the loader, for Perfetto."""
    file = Path(setting.work) / "trace.json.gz"
    file.unlink(missing_ok=True)
    profiled(setting, TRACED, file)
    size = file.stat().st_size
    return [
        Row(
            f"three steps of {TRACED}",
            "written",
            f"{file.name}, {format_decimal_bytes(size)}",
            size > 0,
            {"bytes": size},
        )
    ]


def profiled(setting: Setting, name: str, trace: Path | None) -> dict[str, Any]:
    """The figures of a profile of the stage `step` and of the run end to end."""
    recipe, ranks = recipe_of(setting, name), ranks_from_environment()
    seconds = setting.seconds if trace is None else setting.seconds / 4
    try:
        with process_group(ranks, recipe.health.silent_s) as control_group:
            return profile_recipe(recipe, None, ["step"], seconds, control_group, trace)
    except RecipeError as error:  # too little memory, or too few images
        raise CannotRun(str(error)) from None


def rows_of_figures(name: str, figures: dict[str, Any]) -> list[Row]:
    """The figures of a profile, with their requirements."""
    machine, whole, alone = figures["machine"], figures["whole"], figures["stages"]["step"]["images_per_s"]
    peak, step_mfu = machine["matrix_flops_per_s"], alone * figures["flops_an_image"] / machine["matrix_flops_per_s"]
    products = f"{peak / 1e12:,.3g} TFLOP/s of {machine['matrix_dtype']} matrix products"
    on_h100 = "H100" in machine["name"]
    rate, mfu, wait = whole["images_per_s"], whole["mfu_measured"], whole["data_wait"]
    least, share = IMAGES_PER_S.get(name) if on_h100 else None, whole["engine_share"]
    most = ENGINE_SHARE.get(name)
    waits = f"{wait:.2%}; p99 {1e3 * whole['data_wait_p99_s']:.2f} of {1e3 * whole['step_s']:,.1f} ms"
    memory = "none: a CPU" if whole["gpu_bytes"] is None else format_decimal_bytes(whole["gpu_bytes"])
    return [
        Row("step alone", "", f"{alone:,.0f} images/s, MFU {step_mfu:.1%}", True, {"profile": figures}),
        Row(
            f"with the loader, micro-batch {figures['micro_batch_size']}",
            f">= {least:,.0f} images/s" if least else "",
            f"{rate:,.0f} images/s",
            least is None or rate >= least,
            {"images_per_s": rate},
        ),
        Row(
            "MFU with the loader",
            f">= {MFU[name]:.0%}" if name in MFU else "",
            f"{mfu:.1%} of {products}",
            mfu >= MFU.get(name, 0.0),
            {"mfu": mfu},
        ),
        Row("data wait", f"< {DATA_WAIT:.0%}", waits, wait < DATA_WAIT, {"data_wait": wait}),
        Row(
            "DeepSpeed's share of forward and backward",
            f"< {most:.0%}" if most else "",
            f"{share:.1%}",
            most is None or share < most,
            {"engine_share": share},
        ),
        Row("peak memory, torch's", "", memory, True, {"gpu_bytes": whole["gpu_bytes"]}),
    ]
