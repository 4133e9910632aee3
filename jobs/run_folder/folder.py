"""A run's folder: what was asked (`config.yaml`), what was seen (`metrics.jsonl`), what was kept (`checkpoints/`).

Beside them: `status.json` and `run.lock` (maelstream.jobs.run_folder.status), `ranks/` (maelstream.jobs.distributed.health), `environment.json`, `tensorboard/`,
`quarantine.jsonl`, `reconstructions/` (maelstream.jobs.reporting.reconstruction_files).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from maelstream.pipeline.loader import BadSample
from maelstream.shards.durable import written_whole
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def target_file(self) -> Path:
        """The run's own copy of what the targets "pca" and "token" compare with."""
        return self.path / "target.safetensors"

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
        """A file a rank of the start that is going on."""
        return self.path / "ranks"

    @property
    def environment(self) -> Path:
        """What each start was carried out with (maelstream.jobs.run_folder.environment)."""
        return self.path / "environment.json"

    @property
    def quarantined(self) -> Path:
        """A line a sample that was replaced."""
        return self.path / "quarantine.jsonl"

    @property
    def reconstructions(self) -> Path:
        """Pictures, a folder for each set of weights and images (maelstream.jobs.reporting.reconstruction_files)."""
        return self.path / "reconstructions"

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.path / "checkpoints")

    def recipe(self) -> Recipe:
        """The recipe that a pre-training was last started with; MaelstreamError when the folder holds none."""
        found = self.any_recipe()
        if not isinstance(found, Recipe):
            raise MaelstreamError(
                f"{self.path} is a run of {found.job}; give one of `maelstream pretrain`, or measure it by "
                f"`maelstream evaluate {self.path} VAL`"
            )
        return found

    def any_recipe(self) -> AnyRecipe:
        """The recipe that the run was last started with; MaelstreamError when the folder is not a run's."""
        if not self.config.exists():
            raise MaelstreamError(f"{self.path} is not a run: it has no config.yaml; `maelstream pretrain` makes one")
        return load_any_recipe(self.config)

    def last_step(self) -> int:
        """Step of the newest checkpoint; MaelstreamError when there is none."""
        if not (steps := self.checkpoints.steps()):
            raise MaelstreamError(f"{self.path} has no checkpoint yet; let the run reach its first one")
        return steps[-1]

    def check_same_experiment(self, recipe: AnyRecipe, allowed: tuple[str, ...]) -> None:
        """RecipeError when the folder holds a run of another experiment, `allowed` keys left out."""
        if forever := [name for name in allowed if not may_change(name)]:
            raise RecipeError(
                f"--allow {' '.join(forever)}: a run keeps it for life; start a new one with another --run"
            )
        if not self.config.exists():
            return
        old = self.any_recipe()
        if differences := {name: values for name, values in differing_keys(old, recipe).items() if name not in allowed}:
            listed = ", ".join(f"{name} ({was!r}, now {now!r})" for name, (was, now) in differences.items())
            harmless = [name for name in differences if may_change(name)]
            hint = f", --allow {' '.join(harmless)}" if len(harmless) == len(differences) else ""
            raise RecipeError(
                f"{self.path} holds a run with another {listed}; give the old values again{hint}, or another --run"
            )

    def start(self, recipe: AnyRecipe, step: int) -> None:
        """Makes the folder ready to go on after `step` steps: later lines of the metrics were never checkpointed."""
        self.path.mkdir(parents=True, exist_ok=True)
        with written_whole(self.config) as file:
            file.write(dump_recipe(recipe).encode())
        lines = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        with written_whole(self.metrics) as file:
            file.write("".join(lines).encode())

    def quarantine(self, bad: BadSample) -> None:
        """Notes a sample that was replaced, a line of quarantine.jsonl; every rank adds those that it meets."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.quarantined.open("a") as file:
            file.write(json.dumps(asdict(bad)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """A dict a log step, ascending; a last line that a crash cut short is left out."""
        if not self.metrics.exists():
            return []
        whole = self.metrics.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]
