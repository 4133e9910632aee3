"""The files in a run's folder. Reading them needs no torch.

config.yaml            the recipe
metrics.jsonl          one line per logged step
checkpoints/           jobs/checkpointing/store.py
status.json, run.lock  jobs/run_folder/status.py
environment.json       jobs/run_folder/environment.py
ranks/                 jobs/distributed/health.py
quarantine.jsonl       one line per replaced sample
target.safetensors     the file that the targets "pca" and "token" need
init.safetensors       the weights of --init
reconstructions/       jobs/reporting/reconstruction_files.py
tensorboard/
"""

import json
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
        """One dict per logged step, ascending; a last line that a crash cut short is skipped."""
        if not self.metrics.exists():
            return []
        complete = self.metrics.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in complete.splitlines()]
