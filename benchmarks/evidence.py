"""Checks the paper's claims on CIFAR-10 with three seeds: `make evidence SRC=cifar10.tar.gz`.

    python -m benchmarks.evidence cifar10.tar.gz                   # reduced: about two hours of 2 CPU cores
    python -m benchmarks.evidence cifar10.tar.gz --size whole      # one GPU

Every number is a run of `maelstream sweep` or `maelstream scratch` below --dir, so the same command resumes after a
stop. docs/measured/evidence-SIZE.md is rewritten after each part and at a stop. Without a GPU, one part runs on each
core with one thread, because a model this small gains little from a second thread. Recipes: recipes/evidence/.
"""

import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
import yaml

from maelstream.jobs.distributed.launching import SignalForwarder, gpu_count
from maelstream.jobs.evaluation.results import read_evaluations
from maelstream.shards.durable import atomic_write

SEEDS = (0, 1, 2)
LABELLED = {"reduced": 500, "whole": 5000}
"""Images per class that are trained on with labels; pre-training uses all images."""
BLOCKS = {"reduced": ("0", "1", "2"), "whole": ("0", "0.5", "1", "2", "4", "6", "12")}
FEW_BLOCKS = {"reduced": "1", "whole": "4"}
"""The number of blocks that should close most of the gap: a quarter and a third of all blocks."""
RATIOS = {"reduced": (0.5, 0.85, 0.95), "whole": (0.4, 0.5, 0.6, 0.85, 0.95)}
"""Mask ratios in addition to the recipe's 0.75."""


@dataclass(frozen=True)
class Options:
    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """CIFAR-10 as images: a tar, or a folder, with `train/CLASS/` and `test/CLASS/`."""
    size: Literal["reduced", "whole"] = "reduced"
    dir: Path = Path("runs/evidence")
    out: Path = Path("docs/measured")
    workers: int = 1 if gpu_count() else len(os.sched_getaffinity(0))
    """Parts that run at the same time; without a GPU each has its own cores."""


class Setting(NamedTuple):
    """One row of the table: runs of three seeds."""

    name: str
    runs: str
    """Folder of the runs, without the seed at its end."""


class Claim(NamedTuple):
    """The claim that `better` is above `worse`; each is (row, evaluation)."""

    text: str
    better: tuple[str, str]
    worse: tuple[str, str]


class Evidence:
    """The experiments: their commands, the rows of the table and the claims."""

    def __init__(self, options: Options):
        self._size, self._dir = options.size, options.dir
        self._recipes = Path("recipes/evidence") / options.size
        self.runs = options.dir / options.size
        own = yaml.safe_load((self._recipes / "finetune.yaml").read_text())
        self._finetune_epochs = own["optim"]["epochs"]

    def commands(self) -> Iterator[list[str]]:
        """Commands of maelstream, the most informative first. No two write into the same folder."""
        probe, tune = self._then("linprobe"), self._then("finetune")
        blocks = [word for number in BLOCKS[self._size] for word in self._then("partial", "--blocks", number)]
        yield self._sweep("base", *probe, *tune, *blocks)
        yield from self._scratch(1)
        yield self._sweep("random", "--grid", "recipes/evidence/random.yaml", *probe)
        yield self._sweep("masks", "--grid", "recipes/evidence/masks.yaml", *probe)
        yield self._sweep("decoder", "--grid", "model.decoder_depth=1", *probe, *tune)
        yield from self._scratch(2)
        yield self._sweep("ratio", "--grid", f"model.mask_ratio={','.join(map(str, RATIOS[self._size]))}", *probe)
        yield self._sweep("target", "--grid", "model.target=pixel", *probe, *tune)

    def _then(self, job: str, *options: str) -> list[str]:
        recipe = self._recipes / f"{'finetune' if job == 'partial' else job}.yaml"
        return ["--then", " ".join((job, "--recipe", str(recipe), *options))]

    def _sweep(self, name: str, *options: str) -> list[str]:
        data = ["--train", f"{self._dir / f'labelled-{self._size}'}", "--val", str(self._dir / "test")]
        where = ["--dir", str(self.runs / name), "--seeds", ",".join(map(str, SEEDS))]
        return ["sweep", str(self._recipes / "pretrain.yaml"), *where, *data, *options]

    def _scratch(self, times: int) -> Iterator[list[str]]:
        for seed in SEEDS:
            run = self.runs / f"scratch-x{times}" / f"seed-{seed}"
            if not read_evaluations(run):
                data = [str(self._dir / f"labelled-{self._size}"), str(self._dir / "test")]
                epochs = ["--optim.epochs", str(times * self._finetune_epochs), "--seed", str(seed)]
                recipe = ["--recipe", str(self._recipes / "scratch.yaml"), "--run", str(run)]
                yield ["launch", "--nproc", str(max(1, gpu_count())), "scratch", *data, *recipe, *epochs]

    def settings(self) -> list[Setting]:
        runs = [("random 75 % (the recipe)", "base/the-recipe"), ("no pre-training", "random/random-encoder")]
        runs += [(f"{mask} 75 %", f"masks/{mask}") for mask in ("block", "grid")]
        runs += [(f"mask ratio {ratio}", f"ratio/mask-ratio-{ratio}") for ratio in RATIOS[self._size]]
        runs += [("decoder of depth 1", "decoder/decoder-depth-1"), ("target: pixels", "target/target-pixel")]
        supervised = [Setting(f"supervised, {times} x the epochs", f"scratch-x{times}/seed-") for times in (1, 2)]
        return [Setting(name, f"{run}_seed-") for name, run in runs] + supervised

    def claims(self) -> list[Claim]:
        own, shallow = "random 75 % (the recipe)", "decoder of depth 1"
        few = f"partial {FEW_BLOCKS[self._size]}"
        low, high = (f"mask ratio {each(RATIOS[self._size])}" for each in (min, max))
        once, twice = (f"supervised, {times} x the epochs" for times in (1, 2))
        pairs = [
            ("1. pre-trained and fine-tuned over supervised", (own, "finetune"), (once, "scratch")),
            ("1. and over supervised for twice the epochs", (own, "finetune"), (twice, "scratch")),
            ("2. fine-tuning over linear probing", (own, "finetune"), (own, "linprobe")),
            (f"2. {few} over none", (own, few), (own, "partial 0")),
            (f"2. fine-tuning over {few}", (own, "finetune"), (own, few)),
            ("3. random over block masks, linear", (own, "linprobe"), ("block 75 %", "linprobe")),
            ("3. random over grid masks, linear", (own, "linprobe"), ("grid 75 %", "linprobe")),
            (f"3. mask ratio 0.75 over {low.split()[-1]}, linear", (own, "linprobe"), (low, "linprobe")),
            (f"3. mask ratio 0.75 over {high.split()[-1]}, linear", (own, "linprobe"), (high, "linprobe")),
            ("4. the deeper decoder, linear", (own, "linprobe"), (shallow, "linprobe")),
            ("4. the deeper decoder, fine-tuned", (own, "finetune"), (shallow, "finetune")),
            ("4. normalised pixels over pixels, linear", (own, "linprobe"), ("target: pixels", "linprobe")),
            ("4. normalised pixels over pixels, fine-tuned", (own, "finetune"), ("target: pixels", "finetune")),
            ("5. pre-trained over random weights, linear", (own, "linprobe"), ("no pre-training", "linprobe")),
        ]
        return [Claim(*pair) for pair in pairs]

    def found(self) -> dict[tuple[str, str], dict[int, float]]:
        """Top-1 in percent by seed, of each finished (row, evaluation)."""
        found: dict[tuple[str, str], dict[int, float]] = {}
        for setting in self.settings():
            for seed in SEEDS:
                for evaluation in read_evaluations(self.runs / f"{setting.runs}{seed}"):
                    blocks = evaluation.settings.get("blocks")
                    job = f"partial {blocks:g}" if evaluation.job == "partial" else evaluation.job
                    found.setdefault((setting.name, job), {})[seed] = evaluation.top1
        return found


def spread(values: list[float]) -> str:
    """Mean, sample standard deviation, and the number of seeds if some are missing."""
    several = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    some = f" ({len(values)} of {len(SEEDS)})" if len(values) < len(SEEDS) else ""
    return f"{statistics.mean(values):.2f}{several}{some}"


def page(evidence: Evidence, size: str) -> str:
    """The finished results as Markdown: one row per setting, and the difference of each claim over the seeds."""
    found = evidence.found()
    jobs = [*dict.fromkeys(job for _, job in found)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"# Evidence on CIFAR-10, {size}",
        "",
        f"    python -m benchmarks.evidence cifar10.tar.gz --size {size}",
        "",
        f"{device}, torch {torch.__version__}. Top-1 in percent of all test images, mean ± sample deviation of "
        f"{len(SEEDS)} seeds.",
        "",
        "| | " + " | ".join(jobs) + " |",
        "|---" * (len(jobs) + 1) + "|",
    ]
    for setting in evidence.settings():
        cells = [found.get((setting.name, job)) for job in jobs]
        if any(cells):
            lines.append(f"| {setting.name} | " + " | ".join(spread([*c.values()]) if c else "" for c in cells) + " |")
    lines += ["", "| the paper says | difference, points | of the seeds |", "|---|---|---|"]
    for claim in evidence.claims():
        better, worse = found.get(claim.better, {}), found.get(claim.worse, {})
        differences = [better[seed] - worse[seed] for seed in SEEDS if seed in better and seed in worse]
        above = sum(difference > 0 for difference in differences)
        result = f"{spread(differences)} | {above} of {len(differences)}" if differences else "open | "
        lines.append(f"| {claim.text} | {result} |")
    return "\n".join(lines) + "\n"


def prepare(options: Options) -> None:
    """Packs the training images, the labelled ones and the test images, unless they are packed already."""
    images = options.src
    if images.is_file():
        images = options.dir / "images"
        if not images.exists():
            part = options.dir / "images.part"
            with tarfile.open(options.src) as tar:
                tar.extractall(part, filter="data")
            part.rename(images)
    labelled = options.dir / f"images-{options.size}"
    for folder in sorted((images / "train").iterdir()):
        (labelled / folder.name).mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir())[: LABELLED[options.size]]:
            link = labelled / folder.name / file.name
            if not link.is_symlink():
                link.symlink_to(file.resolve())
    sources = {"train": images / "train", "test": images / "test", f"labelled-{options.size}": labelled}
    for name, source in sources.items():
        run(["pack", str(source), str(options.dir / name), "--split", name.partition("-")[0], "--seed", "0"])


def run(command: list[str]) -> None:
    """Runs a command of maelstream; exits with its exit code if it is not 0."""
    if code := subprocess.run([sys.executable, "-m", "maelstream.jobs.command", *command], check=False).returncode:
        sys.exit(code)


def run_side_by_side(commands: Iterable[list[str]], workers: int, on_end: Callable[[], None]) -> int:
    """Runs commands of maelstream, `workers` at a time, and calls `on_end` after each.

    Returns the first exit code that is not 0. A signal or a failure ends all of them, each at a checkpoint.
    """
    cores, waiting = sorted(os.sched_getaffinity(0)), deque(commands)
    share = max(1, len(cores) // workers)
    running: dict[int, subprocess.Popen] = {}
    code = 0
    with SignalForwarder() as signals:
        while running or waiting:
            for worker in range(workers):
                if worker not in running and waiting:
                    own = cores[worker * share % len(cores) :][:share] if workers > 1 else cores
                    running[worker] = started(waiting.popleft(), own)
                    signals.forward_to([*running.values()])
            time.sleep(0.2)
            ended = {worker: process.returncode for worker, process in running.items() if process.poll() is not None}
            for worker in ended:
                del running[worker]
                on_end()
            failed = 128 + signals.received if signals.received else next(filter(None, ended.values()), 0)
            if failed and not code:
                code = failed
                waiting.clear()
                for process in running.values() if not signals.received else ():  # a signal has reached them already
                    process.terminate()
    return code


def started(command: list[str], cores: list[int]) -> subprocess.Popen:
    """Starts a command of maelstream on these cores, in a session of its own: Ctrl-C reaches it only from here."""
    return subprocess.Popen(
        [sys.executable, "-m", "maelstream.jobs.command", *command],
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        start_new_session=True,
    )


def main() -> None:
    """Packs the data, runs every part and writes the page after each."""
    options = tyro.cli(Options)
    prepare(options)
    evidence = Evidence(options)

    def write_page() -> None:
        with atomic_write(options.out / f"evidence-{options.size}.md") as file:
            file.write(page(evidence, options.size).encode())

    sys.exit(run_side_by_side(evidence.commands(), options.workers, write_page))


if __name__ == "__main__":
    main()
