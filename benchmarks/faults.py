"""The fault table: which faults a run survives, how often each was tried, and the worst result.

    python -m benchmarks.faults                       # all rows, about an hour on 2 cores
    python -m benchmarks.faults --rows kills damage --times 10

It trains a small model on 2 CPU ranks and compares each run with one without faults. The row of full disks needs the
right to mount a tmpfs. Short versions of these rows are tests (tests/e2e/test_faults.py, tests/e2e/test_launch.py).
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch
import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.pack import main as pack
from maelstream.jobs.run_folder.folder import RunFolder
from tests.conftest import TINY, write_images
from tests.helpers.forked import Running, run_ranks, start
from tests.helpers.saved import control_group, save, save_in_a_process

STEPS = 12


@dataclass(frozen=True)
class Outcome:
    """The result of one row."""

    times: int
    passed: int
    worst: str


@dataclass(frozen=True)
class Bench:
    """What all rows share: the folder for runs, the recipe and a random generator."""

    folder: Path
    recipe: str
    rng: random.Random

    def run(self, name: str) -> RunFolder:
        """An empty run folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return RunFolder(self.folder / name)

    def start(
        self, ranks: int, folder: RunFolder, *args: str, fault: str = "", faulty_rank: int | None = None
    ) -> Running:
        output = self.folder / "output"
        return start(
            ranks, self.recipe, "--run", str(folder.path), *args, output=output, fault=fault, faulty_rank=faulty_rank
        )

    def finish(self, ranks: int, folder: RunFolder, *args: str) -> Running:
        return run_ranks(ranks, self.recipe, "--run", str(folder.path), *args, output=self.folder / "output")


def tiny_recipe(folder: Path) -> str:
    """Packs images below `folder` into `folder`/shards, and writes a recipe that trains on them; returns its path."""
    write_images(folder / "images", classes=3, per_class=20)
    pack([str(folder / "images"), str(folder / "shards"), "--shard-size", "40KiB", "--workers", "1"])
    (folder / "tiny.yaml").write_text(TINY + f"data: {{dataset: {folder / 'shards'}}}\n")
    return str(folder / "tiny.yaml")


def losses(folder: RunFolder) -> list[float]:
    return [line["loss"] for line in folder.read_metrics()]


def same(ours: RunFolder, theirs: RunFolder, steps: int = STEPS) -> bool:
    """Whether all losses, and all parameters after `steps` steps, are bit-identical."""
    one, other = ours.checkpoints.weights(steps), theirs.checkpoints.weights(steps)
    return losses(ours) == losses(theirs) and all(torch.equal(one[name], other[name]) for name in other)


def kills(bench: Bench, times: int) -> Outcome:
    """kill -9 of all ranks at random moments, a third of them while a save is being written; saves at every step."""
    unbroken, passed, done, in_save, damaged = bench.run("unbroken"), 0, 0, 0, 0
    bench.finish(2, unbroken)
    while done < times:
        folder = bench.run("killed")
        for _ in range(min(10, times - done)):
            running = bench.start(2, folder, "--checkpoint.every-steps", "1", fault="slow_save:0.03")
            end = time.monotonic() + 30
            if done % 3 == 0:
                while not list(folder.checkpoints.folder.glob("*.writing")) and time.monotonic() < end:
                    if not any(rank.is_alive() for rank in running.ranks):
                        break
                    time.sleep(0.002)
            else:
                time.sleep(bench.rng.uniform(0.2, 1.6))
            in_save += bool(list(folder.checkpoints.folder.glob("*.writing")))
            running.kill()
            done += 1
            damaged += bool([step for step in folder.checkpoints.steps() if folder.checkpoints.fault(step)])
        bench.finish(2, folder)
        passed += same(folder, unbroken) * min(10, times)
    return Outcome(done, min(passed, done) if not damaged else 0, f"{in_save} kills hit a save; all bits equal")


def file_operations(bench: Bench, times: int) -> Outcome:
    """The process dies at each open, sync, rename, mkdir and removal of a save in turn."""
    operation, passed = 0, 0
    while True:
        operation += 1
        folder = bench.run("operations").checkpoints
        save(folder.folder, 1)
        code = save_in_a_process(folder.folder, 2, f"kill_at_file_operation:{operation}")
        passed += bool(folder.steps()) and not any(map(folder.fault, folder.steps()))
        if code == 0:
            return Outcome(operation, passed, "no partial checkpoint was listed or loaded")


def damage(bench: Bench, times: int) -> Outcome:
    """A file of the newest checkpoint is cut, removed, or has a bit flipped; two ranks resume."""
    whole, passed, slowest = bench.run("whole"), 0, 0.0
    bench.finish(2, whole, "--stop-at-step", "8")
    for number in range(times):
        folder = bench.run("damaged")
        shutil.copytree(whole.path, folder.path)
        file = bench.rng.choice(sorted(folder.checkpoints.at(8).iterdir()))
        data, kind = bytearray(file.read_bytes()), ("cut", "removed", "flipped")[number % 3]
        if kind == "removed":
            file.unlink()
        elif kind == "cut":
            file.write_bytes(data[: bench.rng.randrange(len(data))])
        else:
            data[bench.rng.randrange(len(data))] ^= 1 << bench.rng.randrange(8)
            file.write_bytes(data)
        began = time.monotonic()
        done = bench.finish(2, folder, "--stop-at-step", "5")
        slowest = max(slowest, time.monotonic() - began)
        passed += str(folder.checkpoints.at(8)) in done.printed and "resuming from step-00000004" in done.printed
    return Outcome(times, passed, f"detected, and resumed from the checkpoint before, within {slowest:.1f} s")


def orphans(bench: Bench, times: int) -> Outcome:
    """The launcher and one rank are killed in turn; within 10 s no process may be left, and the exit code is not 0."""
    passed, slowest = 0, 0.0
    for number in range(2 * times):
        folder = bench.run("orphans")
        launch = (sys.executable, "-m", "maelstream.jobs.command", "launch", "--nproc", "2")
        command = (*launch, "pretrain", bench.recipe, "--run", str(folder.path), "--optim.epochs", "4000")
        launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(folder.read_metrics()) < 3:
            time.sleep(0.1)
        ranks = psutil.Process(launcher.pid).children()
        began = time.monotonic()
        (psutil.Process(launcher.pid) if number % 2 else ranks[1]).kill()
        _, alive = psutil.wait_procs(ranks, timeout=10)
        slowest = max(slowest, time.monotonic() - began)
        for process in alive:
            process.kill()
        passed += not alive and launcher.wait(20) != 0
    return Outcome(2 * times, passed, f"all processes ended after {slowest:.1f} s")


def stops(bench: Bench, times: int) -> Outcome:
    """SIGTERM to all ranks, as from the launcher, at a random moment: at the start, in a step, in a save."""
    passed, longest, lost, in_start = 0, 0.0, 0, 0
    for number in range(times):
        folder = bench.run("stopped")
        options = ("--checkpoint.every-steps", "2", "--optim.epochs", "400")
        running = bench.start(2, folder, *options, fault="slow_save:0.05")
        while number % 3 and not folder.read_metrics():  # one in three comes at any time, the others after a step
            time.sleep(0.01)
        time.sleep(bench.rng.uniform(0.0, 2.0))
        began = time.monotonic()
        running.kill(signal.SIGTERM)
        codes = running.wait(60)
        longest = max(longest, time.monotonic() - began)
        lines, steps = folder.read_metrics(), folder.checkpoints.steps()
        unsaved = (lines[-1]["step"] if lines else 0) - (steps[-1] if steps else 0)
        lost, in_start = max(lost, unsaved), in_start + (not lines)
        # Before the signal handlers are installed, SIGTERM ends the process with -15, which a shell reports as 143. At
        # the start a rank may lose the other one (69) before it gets its own signal; the launcher then returns the
        # other's code.
        ended = set(codes) <= {143, -15} or (not lines and set(codes) <= {143, -15, 69} and set(codes) != {69})
        passed += unsaved <= 1 and ended
        if not (unsaved <= 1 and ended):
            print(codes, unsaved, running.printed)
    return Outcome(times, passed, f"at most {lost} steps lost, ended within {longest:.1f} s; {in_start} at the start")


LONG_STEPS = 120
SIGNALS = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU),  # save
    *(signal.SIGQUIT, signal.SIGUSR2, signal.SIGALRM),  # end the run at once
)


def signals(bench: Bench, times: int) -> Outcome:
    """One of eight signals at a random moment to the launcher or one rank, on 1 and 2 ranks; then the run resumes."""
    options = ("--optim.epochs", str(LONG_STEPS / 5), "--checkpoint.every-steps", "10")
    launch = (sys.executable, "-m", "maelstream.jobs.command", "launch", "--nproc")
    unbroken, whole_s = {}, {}
    for ranks in (1, 2):
        unbroken[ranks] = bench.run(f"unbroken-{ranks}")
        began = time.monotonic()
        arguments = ("pretrain", bench.recipe, "--run", str(unbroken[ranks].path), *options)
        subprocess.run([*launch, str(ranks), *arguments], check=True, capture_output=True)
        whole_s[ranks] = time.monotonic() - began
    passed, longest, before_first_step, saved = 0, 0.0, 0, 0
    for number in range(times):
        rng = random.Random(number)  # so that one failing number can be repeated
        ranks, kind, folder = 1 + number % 2, SIGNALS[number // 2 % len(SIGNALS)], bench.run("signalled")
        output = (bench.folder / "output").open("w+")
        arguments = ("pretrain", bench.recipe, "--run", str(folder.path), *options)
        launcher = psutil.Popen([*launch, str(ranks), *arguments], stdout=output, stderr=output, start_new_session=True)
        if number % 4 < 2:  # half of the signals come at any time, the others while steps are taken
            time.sleep(rng.uniform(0.0, whole_s[ranks]))
        else:
            while launcher.poll() is None and not folder.read_metrics():
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 2.0))
        children = launcher.children(recursive=True) if launcher.is_running() else []
        target = rng.choice([launcher, *children]) if rng.random() < 0.5 else launcher
        before_first_step += not folder.read_metrics()
        with contextlib.suppress(psutil.NoSuchProcess):
            target.send_signal(kind)
        began, hangs = time.monotonic(), False
        try:
            code = launcher.wait(60)
        except psutil.TimeoutExpired:
            hangs, code = True, None
        longest = max(longest, time.monotonic() - began)
        _, orphans = psutil.wait_procs(children, 10)
        for process in (launcher, *orphans):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        saved += code == 128 + kind and bool(folder.checkpoints.steps())
        output.seek(0)
        printed = output.read()
        bench.finish(ranks, folder, *options)
        good = not hangs and not orphans and "Traceback" not in printed and same(folder, unbroken[ranks], LONG_STEPS)
        passed += good
        if not good:
            print(
                f"{number}: {ranks} ranks, {kind.name}, code {code}, hangs {hangs}, {len(orphans)} orphans\n{printed}"
            )
    result = f"ended within {longest:.1f} s, no process left; {before_first_step} before the first step"
    return Outcome(times, passed, f"{result}; {saved} saved and ended with the signal's code; all bits equal")


def elastic(bench: Bench, times: int) -> Outcome:
    """2 -> 1 -> 3 -> 4 -> 2 ranks in mid-epoch, with ZeRO 1, 2 and 3, in bf16 and float32."""
    passed, done, worst = 0, 0, {"bf16": 0.0, "fp32": 0.0}
    for zero in ("1", "2", "3"):
        for precision, limit in (("bf16", 1e-4), ("fp32", 1e-6)):
            engine, unbroken = ("--engine.zero", zero, "--engine.precision", precision), bench.run("unbroken")
            bench.finish(2, unbroken, *engine)
            for _ in range(times):
                folder = bench.run("elastic")
                stops = sorted(bench.rng.sample(range(1, STEPS), 4))
                for ranks, stop in zip((2, 1, 3, 4, 2), [*stops, STEPS], strict=True):
                    bench.finish(ranks, folder, *engine, "--stop-at-step", str(stop))
                pairs = zip(losses(folder), losses(unbroken), strict=True)
                difference = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
                worst[precision] = max(worst[precision], difference)
                passed, done = passed + (difference < limit), done + 1
    return Outcome(done, passed, f"losses differ by {worst['bf16']:.1e} in bf16, {worst['fp32']:.1e} in float32")


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(bench: Bench, times: int) -> Outcome:
    """A tmpfs has space for one checkpoint and part of the next; later there is space again."""
    passed = continued = 0
    for number in range(times):
        folder = bench.run("full")
        with small_disk(folder.path, 1500 + 60 * number):  # a save needs 1400 KiB, of which it frees 350
            running = bench.start(2, folder)
            codes = running.wait(60)
            steps = folder.checkpoints.steps()
            whole = bool(steps) and not any(map(folder.checkpoints.fault, steps))
            clear = "cannot be written" in running.printed and "Traceback" not in running.printed
            continued += "training continues" in running.printed
            passed += whole and clear and set(codes) <= {0, 2}
    return Outcome(times, passed, f"the earlier checkpoint is intact; {continued} runs continued to the next save")


def nan(bench: Bench, times: int) -> Outcome:
    """NaN in the loss or the gradient of one rank, with ZeRO 1, 2, 3: all ranks skip and count the step."""
    passed = 0
    for number in range(times):
        folder = bench.run("nan")
        fault = ("nan_loss:5", "nan_gradient:5")[number % 2]
        running = bench.start(2, folder, "--engine.zero", str(number % 3 + 1), fault=fault, faulty_rank=number % 2)
        lines = (running.wait(60), folder.read_metrics())[1]
        passed += len(lines) == STEPS and lines[-1]["skipped"] == 1 and lines[4]["loss"] is None
    return Outcome(times, passed, "all ranks skip this step and take the others")


def silence(bench: Bench, times: int) -> Outcome:
    """SIGSTOP to one rank, with `silent_s` 3: the others name it, and the run ends with an exit code."""
    passed, longest = 0, 0.0
    for _ in range(times):
        folder = bench.run("silent")
        running = bench.start(2, folder, "--health.silent-s", "3", fault="stop_process:4", faulty_rank=1)
        running.ranks[0].join(60)
        while len(folder.read_metrics()) < 3:
            time.sleep(0.01)
        codes = running.wait(1)
        longest = max(longest, time.time() - folder.metrics.stat().st_mtime)
        passed += codes[0] == 70 and "rank 1: silent for 3 s" in running.printed
    return Outcome(times, passed, f"ended within {longest:.1f} s of the last step")


ROWS: dict[str, tuple[str, int, Callable[[Bench, int], Outcome]]] = {
    "kills": ("kill -9 of all ranks at random moments, also inside a save", 50, kills),
    "operations": ("kill at every file operation of a save", 1, file_operations),
    "damage": ("checkpoint file cut, removed, one bit flipped", 100, damage),
    "orphans": ("launcher, or one rank, killed", 10, orphans),
    "stops": ("SIGTERM at the start, in a step, in a save", 20, stops),
    "signals": ("one of eight signals to the launcher or one rank, at any moment, on 1 and 2 ranks", 200, signals),
    "elastic": ("ranks 2 -> 1 -> 3 -> 4 -> 2 in mid-epoch, ZeRO 1, 2, 3, each in bf16 and float32", 5, elastic),
    "disk": ("disk full during a save (small tmpfs)", 15, full_disk),
    "nan": ("NaN injected on one rank", 3, nan),
    "silence": ("one rank stopped with SIGSTOP", 3, silence),
}


@dataclass(frozen=True)
class Options:
    """Measure the fault table."""

    rows: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ROW")] = tuple(ROWS)
    """Rows to run: kills, operations, damage, orphans, stops, signals, elastic, disk, nan, silence."""
    times: int | None = None
    """Repetitions per row; the table's own numbers if not given."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.faults", description=__doc__)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    table = Table("fault", "times", "passed", "result", "seconds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder, tiny_recipe(folder), random.Random(0))
        control_group()
        for row in options.rows:
            title, times, act = ROWS[row]
            began = time.monotonic()
            outcome = act(bench, options.times or times)
            seconds = f"{time.monotonic() - began:.0f}"
            table.add_row(title, str(outcome.times), str(outcome.passed), outcome.worst, seconds)
            print(f"| {title} | {outcome.times} | {outcome.passed} | {outcome.worst} | {seconds} |", flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
