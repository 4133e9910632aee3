"""Commands that only read files start fast: they import neither torch nor DeepSpeed nor DALI."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from maelstream.jobs.recipe import Recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import Status
from maelstream.shards.dataset import Dataset

HEAVY = {"torch", "deepspeed", "nvidia", "timm", "tensorboard", "matplotlib", "webdataset", "torchvision"}
CPU_SECONDS = 0.5

# The last line that the child prints is its exit code, its CPU seconds and the modules that it imported.
CHILD = """
import json, resource, sys
from maelstream.jobs.command import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code
used = resource.getrusage(resource.RUSAGE_SELF)
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([code, used.ru_utime + used.ru_stime, modules]))
"""


# Runs each command twice in one process, and prints the commands after which a slow package was imported.
ALL = """
import contextlib, io, sys
from benchmarks.startup import MISTAKES
from maelstream.jobs.command import COMMANDS, dispatch
for command in COMMANDS:
    for args, expected in (["--help"], 0), (MISTAKES[command], 2):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                code = dispatch([command, *args])
            except SystemExit as end:
                code = end.code
        slow = {"torch", "deepspeed", "timm", "nvidia.dali"} & set(sys.modules)
        if slow or code != expected:
            print(command, *args, "code", code, *slow)
            sys.exit(1)
"""


@dataclass(frozen=True)
class Ended:
    code: int
    cpu_s: float
    modules: set[str]
    output: str


def run_command(args: list[str], folder: Path) -> Ended:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *args], cwd=folder, capture_output=True, text=True, timeout=60, check=True
    )
    output, _, last = done.stdout.rstrip("\n").rpartition("\n")
    code, cpu_s, modules = json.loads(last)
    return Ended(code, cpu_s, set(modules), output + done.stderr)


@pytest.fixture(scope="module")
def folder(packed: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `runs/one`, its checkpoint of step 7, the dataset `shards` and the recipe `mine.yaml`."""
    folder = tmp_path_factory.mktemp("cheap")
    run = RunFolder(folder / "runs" / "one")
    run.start(Recipe(), 0)
    line = {"step": 7, "epoch": 0.5, "loss": 0.25, "lr": 1e-3, "images_per_s": 1234.5, "data_wait": 0.01}
    line |= {"memory_gib": 2.0, "skipped": 1, "spike": False}
    run.metrics.write_text(json.dumps(line) + "\n")
    Status("running", 7, 100, 4).write(run.status)
    run.checkpoints.at(7).mkdir(parents=True)
    (folder / "shards").symlink_to(packed.folder)
    (folder / "mine.yaml").write_text("model: {dim: 192, depth: 12, heads: 3}\n")
    return folder


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["--help"], 0, "usage: maelstream COMMAND"),
        (["bake"], 2, "no command 'bake'"),
        (["runs", "--help"], 0, "usage: maelstream runs"),
        (["runs"], 0, "7/100"),
        (["runs", "nowhere"], 2, "there is no folder nowhere"),
        (["runs", "--deep"], 2, "Unrecognized options: --deep"),
        (["watch", "--help"], 0, "usage: maelstream watch"),
        (["watch", "runs/one"], 0, "saved step 7"),
        (["watch", "nowhere"], 2, "is not a run"),
        (["info", "--help"], 0, "usage: maelstream info"),
        (["info", "shards"], 0, "60"),
        (["info", "nowhere"], 2, "is not a packed dataset"),
        (["report", "--help"], 0, "usage: maelstream report"),
        (["report", "nowhere"], 2, "is not a run"),
        (["report", "runs/one", "--out", "nowhere/page.html"], 2, "there is no folder nowhere"),
        (["report", "runs/one", "--out", "page.html"], 0, "page.html"),
        (["index", "--help"], 0, "usage: maelstream index"),
        (["index", "nowhere"], 2, "no such folder"),
        (["verify", "--help"], 0, "usage: maelstream verify"),
        (["verify", "nowhere"], 2, "is not a packed dataset"),
        (["plan", "--help"], 0, "usage: maelstream plan"),
        (["plan"], 0, "largest micro-batch"),
        (["plan", "--model", "mine.yaml", "--json"], 0, "images_per_s"),
        (["plan", "--gpu", "v1"], 2, "is not one of b200"),
        (["plan", "--model", "nowhere.yaml"], 2, "cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_only_reads_files_imports_no_torch(
    args: list[str], code: int, expected: str, folder: Path
) -> None:
    ended = run_command(args, folder)
    assert (ended.code, ended.modules & HEAVY) == (code, set()), ended.output
    assert expected in " ".join(ended.output.split())


@pytest.mark.parametrize("args", [["--help"], ["runs", "--help"], ["runs"], ["watch", "runs/one"]], ids=" ".join)
def test_a_command_that_only_reads_files_takes_less_than_half_a_second_of_cpu_time(
    args: list[str], folder: Path
) -> None:
    assert min(run_command(args, folder).cpu_s for _ in range(3)) < CPU_SECONDS


def test_no_command_imports_a_slow_package_for_its_help_or_its_first_error(tmp_path: Path) -> None:
    """benchmarks/startup.py measures the CPU time."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", ALL], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
