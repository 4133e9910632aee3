"""Compares what `maelstream plan` predicts with measurements on this machine, part by part.

    python -m benchmarks.plan [--json FILE]                   # all parts, about five minutes on two cores
    python -m benchmarks.plan --parts state traffic

activations  Bytes that each image adds (benchmarks/activation_memory.py).
state        Bytes of all tensors of an engine on two ranks just before the optimizer's update; ZeRO 1, 2 and 3.
traffic      Bytes of the collectives of these ranks in that step, with two micro-batches.
step         Seconds of forward + backward + AdamW, predicted from FLOPs and the measured rates of matrix products and
             memory. Measured on one CPU thread, in CPU time, so that waiting for a core does not count.
"""

import functools
import gc
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.activation_memory import bytes_per_image
from benchmarks.step import BASE, HUGE, LARGE, Step, adamw, training_step
from maelstream.jobs.distributed.ranks import process_group, ranks_from_environment
from maelstream.jobs.hardware import measure_this_machine
from maelstream.jobs.plan import PlannedRun, predict_step
from maelstream.jobs.recipe import EngineConfig, OptimConfig, Recipe
from maelstream.jobs.training.engine import build_engine, build_model
from maelstream.model.config import MAEConfig
from maelstream.model.mae import MAE
from maelstream.model.memory import ADAMW_BYTES, BUCKET, activation_bytes, parameter_count, state_bytes, traffic
from maelstream.model.optimise import weight_decay_groups
from maelstream.pipeline.batch_plan import BatchSplit

SMALL = MAEConfig(dim=384, heads=6)
# Sizes that are not divisible by two, with both the large and the small parameters of stage 3.
ODD = MAEConfig(
    image_size=(20, 20), patch_size=5, dim=264, depth=2, heads=4, decoder_dim=36, decoder_depth=1, decoder_heads=4
)
RANKS, MICRO_BATCHES = 2, 2
STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)


@dataclass(frozen=True)
class Options:
    parts: tuple[Literal["activations", "state", "traffic", "step"], ...] = ("activations", "state", "traffic", "step")
    batch: int = 4
    """Images per step of the part step."""
    rounds: int = 3
    json: Path | None = None
    """Also write every figure to this file."""


def storages_alive() -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors known to Python and of their gradients, by address.

    The result holds references, because a freed storage would give its address to the next one.
    """
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):  # isinstance would resolve proxies, some of which warn
            for each in (found, found.grad if found.is_leaf else None):
                if each is not None and each.device.type != "meta":
                    storages[each.untyped_storage()._cdata] = each.untyped_storage()
    return storages


def lasting_bytes(before: dict[int, torch.UntypedStorage]) -> list[int]:
    """Sizes of the storages that are not in `before` and are still alive half a second later.

    The wait is needed because gloo's threads release a collective's tensors some time after it has returned.
    """
    alive = {key: storage for key, storage in storages_alive().items() if key not in before}
    for _ in range(5):
        time.sleep(0.1)
        still = storages_alive()
        alive = {key: storage for key, storage in alive.items() if key in still}
    return [storage.nbytes() for storage in alive.values()]


class Collectives:
    """Counts the bytes of tensors that torch.distributed reduces and gathers, by collective."""

    NAMES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")

    def __init__(self) -> None:
        self.bytes = dict.fromkeys(self.NAMES, 0)
        for name in self.NAMES:
            setattr(torch.distributed, name, self._counting(name, getattr(torch.distributed, name)))

    def _counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            whole = max(each.nbytes for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
            if whole > 16:  # norms and overflow flags are single numbers
                self.bytes[name] += whole
            return call(*args, **kwargs)

        return counted


def _rank(rank: int, port: int, config: MAEConfig, out: Path) -> None:
    """Runs one rank: an engine of each stage takes two steps; rank 0 writes the figures before the second update."""
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": RANKS,
        "LOCAL_WORLD_SIZE": RANKS,
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    collectives, found = Collectives(), {}
    images = torch.zeros(2, config.in_chans, *config.image_size, dtype=torch.uint8)
    keys = torch.arange(2)
    with process_group(ranks_from_environment(), 120):
        for stage in STAGES:
            before = storages_alive()
            recipe = Recipe(model=config, optim=OptimConfig(batch_size=8), engine=EngineConfig(zero=stage))
            model = build_model(recipe, None)
            engine = build_engine(recipe, BatchSplit(8, RANKS, MICRO_BATCHES), model)
            buffers = sum(buffer.nbytes for buffer in model.buffers())
            for _ in range(2):  # the moments are allocated in the first update
                collectives.bytes = dict.fromkeys(Collectives.NAMES, 0)
                for number in range(MICRO_BATCHES):
                    engine.backward(engine(images, keys))
                    if number + 1 < MICRO_BATCHES:
                        engine.step()
                alive = lasting_bytes(before)
                engine.step()
            state = sum(size for size in alive if size > 8) - buffers  # not losses, step counts, flags
            found[stage] = {"state": state, "traffic": dict(collectives.bytes)}
            engine.destroy()
            del engine, model
    if rank == 0:
        out.write_text(json.dumps(found))


def engines(config: MAEConfig, context: BaseContext) -> dict[int, dict[str, Any]]:
    """Measures real engines on two ranks: by stage, `state` in bytes and `traffic` in bytes by collective."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        ranks = [context.Process(target=_rank, args=(rank, port, config, out)) for rank in range(RANKS)]  # type: ignore[attr-defined]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        return {int(stage): found for stage, found in json.loads(out.read_text()).items()}


def part_activations() -> dict[str, tuple[float, float]]:
    """Predicted and measured activation bytes per image, by model."""
    rows: dict[str, tuple[float, float]] = {}
    for name, config in {"B/16": BASE, "L/16": LARGE, "H/14": HUGE}.items():
        for checkpointing in (False, True):
            measured = bytes_per_image(config, checkpointing, torch.device("cpu"), bf16=False)
            suffix = ", checkpointing" if checkpointing else ""
            rows[f"{name}{suffix}, MB per image"] = activation_bytes(config, checkpointing, 4) / 1e6, measured / 1e6
            gc.collect()
    return rows


def part_state(found: dict[int, dict[str, Any]], config: MAEConfig) -> dict[str, tuple[float, float]]:
    """Predicted and measured bytes of state per rank, by stage."""
    return {
        f"ZeRO {stage}, bytes per rank": (predicted_state(config, stage), found[stage]["state"]) for stage in STAGES
    }


def predicted_state(config: MAEConfig, stage: int) -> int:
    """Bytes of the resident state; stage 3 also keeps one float32 bucket."""
    state = state_bytes(config, stage, RANKS)
    return state.resident + (4 * BUCKET if stage == 3 else 0)


def part_traffic(found: dict[int, dict[str, Any]], config: MAEConfig) -> dict[str, tuple[float, float]]:
    """Predicted and measured bytes per step, by stage and collective."""
    rows: dict[str, tuple[float, float]] = {}
    for stage in STAGES:
        predicted = traffic(config, stage, RANKS, MICRO_BATCHES)
        measured = found[stage]["traffic"]
        for name, each in zip(Collectives.NAMES, predicted, strict=True):
            if each or measured[name]:
                rows[f"ZeRO {stage}, {name}, bytes per step"] = each, measured[name]
    return rows


def cpu_seconds(step: Step, batch: int, rounds: int) -> float:
    """CPU time of the fastest step on one thread; the rates are those of the fastest repeat as well."""
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    keys, seconds = torch.arange(batch), []
    for _ in range(1 + rounds):
        began = time.process_time()
        step(images, keys)
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def part_step(batch: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Predicted and measured seconds per step, by model."""
    torch.set_num_threads(1)
    measured, devices = {}, [measure_this_machine()]
    sizes = {"S/16": SMALL, "B/16": BASE, "L/16": LARGE, "H/14": HUGE}
    for name, config in sizes.items():
        model = MAE(config)
        step = training_step(model, adamw(weight_decay_groups(model, 0.05)), bf16=False)
        measured[name] = cpu_seconds(step, batch, rounds)
        devices.append(measure_this_machine())
        del model, step
        gc.collect()
    rows: dict[str, tuple[float, float]] = {}
    for name, config in sizes.items():
        run = PlannedRun(config, 1, 1, batch, False, 0, 0, None)
        update = ADAMW_BYTES * parameter_count(config)  # without an engine: AdamW only
        steps = [
            predict_step(run, device, 1)._replace(optimizer=update / device.memory_bytes_per_s) for device in devices
        ]
        predicted = statistics.median(step.seconds for step in steps)
        rows[f"{name}, s per step of {batch} images"] = predicted, measured[name]
    return rows


def main() -> None:
    """Prints one table."""
    options = tyro.cli(Options)
    parts: dict[str, dict[str, tuple[float, float]]] = {}
    if "activations" in options.parts:
        parts["activations"] = part_activations()
    if {"state", "traffic"} & set(options.parts):
        found = engines(ODD, multiprocessing.get_context("spawn"))
        parts |= {"state": part_state(found, ODD)} if "state" in options.parts else {}
        parts |= {"traffic": part_traffic(found, ODD)} if "traffic" in options.parts else {}
    if "step" in options.parts:
        parts["step"] = part_step(options.batch, options.rounds)
    table = Table("", "predicted", "measured", "ratio")
    for rows in parts.values():
        for name, (predicted, measured) in rows.items():
            digits = ",.0f" if "bytes" in name else ",.2f"
            table.add_row(name, f"{predicted:{digits}}", f"{measured:{digits}}", f"{predicted / measured:.3f}")
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(parts, indent=1))


if __name__ == "__main__":
    main()
