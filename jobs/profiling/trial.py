"""One rank of a recipe for a few seconds, without a run's folder: a trial of `maelstream tune`, in its own process.

    python -m maelstream.jobs.profiling.trial RECIPE.yaml SECONDS      # prints {"images_per_s": ...}, or {"failed": "out of memory"}

A micro-batch and the optimizer's step are timed apart, so that a step of any number of micro-batches is known after a
few of them: images/s = batch_size / (micro_batches x micro-batch + step).
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
from maelstream.jobs.profiling.step_stages import fitting_images
from maelstream.jobs.recipe import Recipe, load_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.training.data import loader_of, open_data
from maelstream.jobs.training.engine import build_engine, build_model
from maelstream.jobs.weights.target_file import target_of_run
from maelstream.pipeline.batch_plan import BatchSplit

_WARM_UP, _LEAST = 2, 3  # micro-batches: the first ones compile and fill pools
OUT_OF_MEMORY = "out of memory"


def measured(recipe: Recipe, seconds: float) -> float:
    """Images/s of one rank with this recipe's engine and loader, data included."""
    ranks = ranks_from_environment()
    batch_size, micro = recipe.optim.batch_size, recipe.engine.micro_batch_size
    micro_batches = math.ceil(batch_size / micro)
    batch_split = BatchSplit(math.ceil(batch_size / micro_batches), 1, 1)
    dataset, order = open_data(recipe.data, recipe.seed)
    target_file = target_of_run(recipe, RunFolder(Path("no run")))
    target = None if target_file is None else target_file.target(recipe.model)
    loader = loader_of(recipe, dataset, order, batch_split, 0, recipe.loader.threads or ranks.threads)
    passes: list[float] = []
    steps: list[float] = []
    with process_group(ranks, 600), loader:
        engine = build_engine(recipe, batch_split, build_model(recipe, target))
        batches, began = iter(loader), time.perf_counter()
        while len(passes) < _WARM_UP + _LEAST or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            batch = next(batches)
            images, keys = (tensor.to(engine.device, non_blocking=True) for tensor in (batch.images, batch.keys))
            engine.backward(engine(images, keys))
            _synchronise()
            middle = time.perf_counter()
            engine.step()
            _synchronise()
            passes.append(middle - start)
            steps.append(time.perf_counter() - middle)
            if len(passes) == _WARM_UP:
                began = time.perf_counter()
    micro_s, step_s = (statistics.median(times[_WARM_UP:]) for times in (passes, steps))
    return batch_size / (micro_batches * micro_s + step_s)


def fits(recipe: Recipe, free: float) -> bool:
    """Whether it can be tried with so much memory, by formula: a CPU's system kills what takes too much, and others."""
    return fitting_images(recipe, 1, free) >= min(recipe.engine.micro_batch_size, recipe.optim.batch_size)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(path: str, seconds: str) -> int:
    """Prints one line of JSON."""
    recipe = load_recipe(Path(path))
    if not torch.cuda.is_available() and not fits(recipe, free_bytes(torch.device("cpu"))):
        print(json.dumps({"failed": OUT_OF_MEMORY}))
        return 0
    try:
        print(json.dumps({"images_per_s": measured(recipe, float(seconds))}))
    except (MemoryError, torch.OutOfMemoryError):
        print(json.dumps({"failed": OUT_OF_MEMORY}))
    return 0


if __name__ == "__main__":
    Path("/proc/self/oom_score_adj").write_text("1000")  # of all processes this one is to go
    sys.exit(main(*sys.argv[1:]))
