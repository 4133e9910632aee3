"""A trial of `maelstream tune`: trains one rank of a recipe for a few seconds, in a process without a run folder.

    python -m maelstream.jobs.profiling.trial RECIPE.yaml SECONDS

It prints {"images_per_s": ...} or {"failed": "out of memory"}. Micro-batches and the optimizer's step are timed
separately, so a few micro-batches suffice: images/s = batch_size / (micro_batches x micro_batch_s + optimizer_s).
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

from maelstream.jobs.distributed.ranks import process_group, ranks_from_environment
from maelstream.jobs.hardware import free_bytes
from maelstream.jobs.profiling.step_stages import largest_micro_batch
from maelstream.jobs.profiling.trial_runner import OUT_OF_MEMORY
from maelstream.jobs.recipe import Recipe, load_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.training.data import loader_of, open_data
from maelstream.jobs.training.engine import build_engine, build_model
from maelstream.jobs.weights.target_file import run_target_file
from maelstream.pipeline.batch_plan import BatchSplit

_WARM_UP, _MIN_TIMED = 2, 3  # micro-batches: the first ones compile and fill memory pools


def measure_recipe(recipe: Recipe, seconds: float) -> float:
    """Images/s of one rank with this recipe's engine and loader."""
    ranks = ranks_from_environment()
    batch_size = recipe.optim.batch_size
    micro_batches = math.ceil(batch_size / recipe.engine.micro_batch_size)
    batch_split = BatchSplit(math.ceil(batch_size / micro_batches), 1, 1)
    dataset, order = open_data(recipe.data, recipe.seed)
    target_file = run_target_file(recipe, RunFolder(Path("no run")))
    target = None if target_file is None else target_file.target(recipe.model)
    loader = loader_of(recipe, dataset, order, batch_split, 0, recipe.loader.threads or ranks.threads)
    micro_batch_times: list[float] = []
    optimizer_times: list[float] = []
    with process_group(ranks, 600), loader:
        engine = build_engine(recipe, batch_split, build_model(recipe, target))
        batches, began = iter(loader), time.perf_counter()
        while len(micro_batch_times) < _WARM_UP + _MIN_TIMED or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            batch = next(batches)
            images, keys = (tensor.to(engine.device, non_blocking=True) for tensor in (batch.images, batch.keys))
            engine.backward(engine(images, keys))
            _synchronise()
            middle = time.perf_counter()
            engine.step()
            _synchronise()
            micro_batch_times.append(middle - start)
            optimizer_times.append(time.perf_counter() - middle)
            if len(micro_batch_times) == _WARM_UP:
                began = time.perf_counter()
    micro_batch_s, optimizer_s = (statistics.median(times[_WARM_UP:]) for times in (micro_batch_times, optimizer_times))
    return batch_size / (micro_batches * micro_batch_s + optimizer_s)


def fits_in_memory(recipe: Recipe, free: float) -> bool:
    """Whether the recipe fits into `free` bytes, by formula.

    On a CPU a trial cannot find out by trying: a system without free memory kills processes, not only the one at fault.
    """
    return largest_micro_batch(recipe, 1, free) >= min(recipe.engine.micro_batch_size, recipe.optim.batch_size)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(path: str, seconds: str) -> int:
    """Runs the trial and prints one line of JSON; returns the exit code."""
    recipe = load_recipe(Path(path))
    if not torch.cuda.is_available() and not fits_in_memory(recipe, free_bytes(torch.device("cpu"))):
        print(json.dumps({"failed": OUT_OF_MEMORY}))
        return 0
    try:
        print(json.dumps({"images_per_s": measure_recipe(recipe, float(seconds))}))
    except (MemoryError, torch.OutOfMemoryError):
        print(json.dumps({"failed": OUT_OF_MEMORY}))
    return 0


if __name__ == "__main__":
    Path("/proc/self/oom_score_adj").write_text("1000")  # without free memory, the system kills this process first
    sys.exit(main(*sys.argv[1:]))
