"""The files in a run's folder. Reading them needs no torch.

config.yaml            the recipe
metrics.jsonl          one line per logged step
checkpoints/           jobs/checkpointing/store.py
status.json, run.lock  jobs/run_folder/status.py
environment.json       jobs/run_folder/environment.py
NAME.bad               a damaged file that was put aside (jobs/run_folder/side_files.py)
ranks/                 jobs/distributed/health.py
quarantine.jsonl       one line per replaced sample
target.safetensors     the file that the targets "pca" and "token" need
init.safetensors       the weights of --init
reconstructions/       jobs/reporting/reconstruction_files.py
tensorboard/
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maelstream.jobs.checkpointing.store import CheckpointStore
from maelstream.jobs.recipe import (
    AnyRecipe,
    Recipe,
    RecipeError,
    differing_keys,
    dump_recipe,
    load_any_recipe,
    may_change,
)
from maelstream.shards.durable import atomic_write
from maelstream.shards.errors import MaelstreamError

if TYPE_CHECKING:
    from maelstream.pipeline.sample_source import BadSample


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; creating this object reads and writes nothing."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def target_file(self) -> Path:
        """The run's own copy of the file that the targets "pca" and "token" need."""
        return self.path / "target.safetensors"

    @property
    def initial_weights(self) -> Path:
        """The run's own copy of the weights of `--init`."""
        return self.path / "init.safetensors"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def ranks(self) -> Path:
        """Folder with one heartbeat file per rank of the current start."""
        return self.path / "ranks"

    @property
    def environment(self) -> Path:
        """Machine and package versions of each start."""
        return self.path / "environment.json"

    @property
    def quarantined(self) -> Path:
        """One line per sample that was replaced."""
        return self.path / "quarantine.jsonl"

    @property
    def reconstructions(self) -> Path:
        """Pictures, in one folder per set of weights and images."""
        return self.path / "reconstructions"

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.path / "checkpoints")

    def recipe(self) -> Recipe:
        """The recipe of the newest start of a pre-training run.

        Raises:
            MaelstreamError: the folder is not a run, or it is a run that was trained on labels.
        """
        found = self.any_recipe()
        if not isinstance(found, Recipe):
            raise MaelstreamError(
                f"{self.path} is a run of {found.job}; give a run of `maelstream pretrain`, or evaluate this one with "
                f"`maelstream evaluate {self.path} VAL`"
            )
        return found

    def any_recipe(self) -> AnyRecipe:
        """The recipe of the newest start, of pre-training or of training on labels.

        Raises:
            MaelstreamError: the folder is not a run.
        """
        if not self.config.exists():
            raise MaelstreamError(f"{self.path} is not a run: it has no config.yaml; `maelstream pretrain` makes one")
        return load_any_recipe(self.config)

    def last_step(self) -> int:
        """Step of the newest checkpoint; raises MaelstreamError if there is none."""
        if not (steps := self.checkpoints.steps()):
            raise MaelstreamError(f"{self.path} has no checkpoint yet; wait until the run has written its first one")
        return steps[-1]

    def check_same_experiment(self, recipe: AnyRecipe, allowed: tuple[str, ...]) -> None:
        """Checks that the folder is empty or holds a run of the same experiment; `allowed` keys may differ.

        Raises:
            RecipeError: another key differs, or `allowed` has a key that can never change.
        """
        if fixed := [name for name in allowed if not may_change(name)]:
            raise RecipeError(f"--allow {' '.join(fixed)}: a run keeps it for life; start a new one with another --run")
        if not self.config.exists():
            return
        old = self.any_recipe()
        if old.job != recipe.job:
            raise RecipeError(f"{self.path} holds a run of {old.job}, not of {recipe.job}; give another --run")
        if differences := {name: values for name, values in differing_keys(old, recipe).items() if name not in allowed}:
            listed = ", ".join(f"{name} ({was!r}, now {now!r})" for name, (was, now) in differences.items())
            hint = f", --allow {' '.join(differences)}" if all(map(may_change, differences)) else ""
            raise RecipeError(
                f"{self.path} holds a run with another {listed}; give the old values again{hint}, or another --run"
            )

    def start(self, recipe: AnyRecipe, step: int) -> None:
        """Writes the recipe, and removes the metrics after `step`, because no checkpoint has those steps."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.config) as file:
            file.write(dump_recipe(recipe).encode())
        lines = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        with atomic_write(self.metrics) as file:
            file.write("".join(lines).encode())

    def quarantine(self, bad: "BadSample") -> None:
        """Appends a sample that was replaced to quarantine.jsonl; every rank appends those that it finds."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.quarantined.open("a") as file:
            file.write(json.dumps(asdict(bad)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per logged step; damaged lines are skipped (`side_files.faults` counts them)."""
        return _good_lines(self.metrics, is_logged_step)

    def complete_metrics(self) -> list[dict[str, Any]]:
        """The lines of `read_metrics` that have every value that training always logs."""
        return [line for line in self.read_metrics() if line.keys() >= _LOGGED]

    def read_quarantined(self) -> list[dict[str, Any]]:
        """One dict per sample that was replaced: the fields of `BadSample`; damaged lines are skipped."""
        return _good_lines(self.quarantined, is_replaced_sample)


_LOGGED = {"step", "epoch", "loss", "images_per_s", "data_wait", "memory_gib", "skipped", "spike"}
_MAY_BE_MISSING = {"loss", "grad_norm", "mfu"}  # None in a skipped step, or where it is unknown
_LARGEST = 1e300  # no figure of a run is larger; differences of two such values are finite


def is_logged_step(line: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl has a step and only finite numbers."""
    return (
        is_count(line.get("step"))
        and line["step"] > 0
        and all((value is None and name in _MAY_BE_MISSING) or is_number(value) for name, value in line.items())
    )


def is_replaced_sample(line: dict[str, Any]) -> bool:
    """Whether a line of quarantine.jsonl has the fields of `BadSample` that a report shows."""
    return all(isinstance(line.get(name), str) for name in ("shard", "key", "reason"))


def is_number(value: object) -> bool:
    """Whether a value from JSON is a number or a bool that a figure can have; NaN is not."""
    return isinstance(value, int | float) and abs(value) < _LARGEST


def is_count(value: object) -> bool:
    """Whether a value from JSON is a whole number that a count can have."""
    return type(value) is int and 0 <= value < 2**53


def json_lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each complete line with its JSON object; None if it holds none.

    A last line that a crash cut short is left out. Zeros before or after a line are ignored: a file system that lost
    power may have extended the file without writing its bytes.
    """
    for line in content.rpartition(b"\n")[0].split(b"\n") if b"\n" in content else ():
        line = line.strip(b"\0")
        try:
            value = json.loads(line, parse_constant=lambda _: None)  # a grad_norm of Infinity is unknown
        except (ValueError, RecursionError):
            value = None
        yield line + b"\n", value if isinstance(value, dict) else None


def _good_lines(path: Path, is_good: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [value for _, value in json_lines(path.read_bytes()) if value is not None and is_good(value)]
