"""Runs the trials of `maelstream tune`, each in its own process, so that running out of memory is a result."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from maelstream.jobs.profiling.settings_search import Setting, with_setting
from maelstream.jobs.recipe import Recipe, RecipeError, dump_recipe

OUT_OF_MEMORY = "out of memory"
"""The reason of a failure that a trial prints if its settings need too much memory."""


class TrialRunner:
    """Measures settings of a recipe and prints each result; a trial longer than `limit_s` counts as too slow."""

    def __init__(self, recipe: Recipe, seconds: float, limit_s: float, console: Console) -> None:
        self._recipe, self._seconds, self._limit_s, self._console = recipe, seconds, limit_s, console
        self._too_slow, self._ran = f"more than {limit_s:,.0f} s", False
        self.longest_s = 0.0
        self.failures: list[str] = []

    def __call__(self, setting: Setting) -> float | None:
        """Images/s under `setting`; None if the trial failed.

        Raises:
            RecipeError: the first trial failed for another reason than memory or time.
        """
        began = time.monotonic()
        result = self._result(setting)
        failure = result.get("failed", "")
        if failure not in ("", OUT_OF_MEMORY, self._too_slow) and not self._ran:
            raise RecipeError(f"the recipe does not run on this machine: {failure}")
        self._ran = True
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        rate = result.get("images_per_s")
        if rate is None:
            self.failures.append(result["failed"])
        outcome = f"{rate:,.2f} images/s" if rate is not None else result["failed"]
        self._console.print(f"{outcome:>24}  {', '.join(f'{key} {value}' for key, value in setting.items())}")
        return rate

    def _result(self, setting: Setting) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trial.yaml"
            path.write_text(dump_recipe(with_setting(self._recipe, setting)))
            command = [sys.executable, "-m", "maelstream.jobs.profiling.trial", str(path), str(self._seconds)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=self._limit_s)
            except subprocess.TimeoutExpired:
                return {"failed": self._too_slow}
        if done.returncode == -9:
            return {"failed": OUT_OF_MEMORY}
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            if "can't allocate memory" in last or OUT_OF_MEMORY in last:
                return {"failed": OUT_OF_MEMORY}
            return {"failed": last}
        return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
