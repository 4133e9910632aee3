"""Compares resuming at 90 % of an epoch with a fresh start. Both should take the same time.

loader  From building the loader to its first batch.
run     `maelstream pretrain` for one step, as a process: a new run, and one that resumes, which also reads its
        checkpoint.

Fresh starts and resumed ones take turns; the medians are compared.

    python -m benchmarks.resume --data ../shared/imagenet-sample
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, LoaderConfig
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.order import SampleOrder
from maelstream.shards.dataset import Dataset
from maelstream.shards.executors import Local
from maelstream.shards.pack import pack
from maelstream.shards.plan import PackOptions

BATCH, SIZE = 64, (224, 224)
RUN_BATCH = 16
RECIPE = """
model: {image_size: [64, 64], patch_size: 8, dim: 192, depth: 2, heads: 3, decoder_dim: 96, decoder_depth: 1,
        decoder_heads: 3}
optim: {batch_size: 16, warmup_epochs: 0, epochs: 2}
engine: {micro_batch_size: 16}
"""


@dataclass(frozen=True)
class Options:
    data: Path = Path("../shared/imagenet-sample")
    """A folder of images, with one folder per class."""
    threads: int = 2
    rounds: int = 5
    json: Path | None = None
    """Write the medians to this JSON file: seconds by name."""


def first_batch(dataset: Dataset, position: int, threads: int) -> float:
    """Seconds from building the loader to the batch at `position`."""
    began = time.perf_counter()
    order, draws = SampleOrder(len(dataset), 0), AugmentSampler(0, CropConfig(), SIZE)
    with ImageLoader(dataset, order, draws, BatchSplit(BATCH, 1, 1), config=LoaderConfig(threads)) as loader:
        loader.load_state_dict({"epoch": 0, "position": position})
        next(iter(loader))
        return time.perf_counter() - began


def run_to(recipe: Path, run: Path, step: int) -> float:
    """Seconds of `maelstream pretrain` from its start until `step` is saved."""
    command = [
        sys.executable,
        "-m",
        "maelstream.jobs.pretrain",
        str(recipe),
        "--run",
        str(run),
        "--stop-at-step",
        str(step),
    ]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - began


def main() -> None:
    """Prints one table."""
    options = tyro.cli(Options)
    seconds: dict[str, dict[str, list[float]]] = {part: {"fresh": [], "at 90 %": []} for part in ("loader", "run")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards, pack_options = str(folder / "shards"), PackOptions("b", "train", 2**24, 0)
        pack(str(options.data), shards, pack_options, Local(options.threads), lambda _: None)
        dataset = Dataset.open(shards)
        first_batch(dataset, 0, options.threads)  # fills the page cache and starts DALI once
        recipe = folder / "recipe.yaml"
        recipe.write_text(f"{RECIPE}data: {{dataset: {shards}}}\n")
        late = 9 * len(dataset) // (10 * RUN_BATCH)
        run_to(recipe, folder / "late", late)
        for number in range(options.rounds):
            for when, position in {"fresh": 0, "at 90 %": 9 * len(dataset) // 10}.items():
                seconds["loader"][when].append(first_batch(dataset, position, options.threads))
            seconds["run"]["fresh"].append(run_to(recipe, folder / f"fresh-{number}", 1))
            shutil.copytree(folder / "late", folder / f"late-{number}")
            seconds["run"]["at 90 %"].append(run_to(recipe, folder / f"late-{number}", late + 1))
    medians = {part: {when: statistics.median(found) for when, found in each.items()} for part, each in seconds.items()}
    table = Table("", "fresh, s", "at 90 % of an epoch, s", "ratio", title=f"{len(dataset)} images, medians")
    for part, (fresh, resumed) in ((part, each.values()) for part, each in medians.items()):
        table.add_row(part, f"{fresh:.2f}", f"{resumed:.2f}", f"{resumed / fresh:.2f}")
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
