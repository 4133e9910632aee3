"""The table of a profile and the summary below it report the same rates."""

from typing import Any

import pytest
from rich.console import Console

from maelstream.jobs.profiling.stage_table import engine_line, stage_table, summary

RUN: dict[str, Any] = {
    "steps": 3,
    "images_per_s": 2.07,
    "images_per_s_with_the_recipe_s_batch": 2.16,
    "step_s": 3.9,
    "data_wait": 0.0,
    "data_wait_p50_s": 0.0,
    "data_wait_p99_s": 0.0,
    "cpu_utilisation": 1.0,
    "gpu_utilisation": None,
    "rss_bytes": 1,
    "gpu_bytes": None,
    "mfu_measured": 0.68,
    "mfu_datasheet": None,
    "engine_share": 0.1,
    "engine_noise": 0.02,
}
FIGURES: dict[str, Any] = {
    "recipe": "b16",
    "ranks": 1,
    "machine": {
        "name": "a CPU",
        "cores": 2,
        "matrix_flops_per_s": 1e11,
        "matrix_dtype": "float32",
        "datasheet_flops_per_s": None,
        "memory_bytes_per_s": 1e10,
    },
    "micro_batch_size": 8,
    "micro_batches": {"recipe": 8, "measured": 1},
    "bytes_an_image": 1e5,
    "stages": {
        "step": {"images_per_s": 2.45, "bytes_per_s": None, "limit_images_per_s": None, "why": "products"},
    },
    "whole": RUN,
    "verdict": {"limit": "step", "words": "the step"},
}


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_the_measured_rate_comes_first_and_a_computed_rate_has_its_own_row(micro_batches: int) -> None:
    console = Console(width=200)
    counts = {"recipe": 8, "measured": micro_batches}
    run = RUN if micro_batches == 1 else RUN | {"images_per_s_with_the_recipe_s_batch": 2.07}
    figures = FIGURES | {"micro_batches": counts, "whole": run}
    with console.capture() as printed:
        console.print(stage_table(figures))
    rows = [[cell.strip() for cell in line.split("│")] for line in printed.get().splitlines() if "end to end" in line]
    assert rows[0][1:3] == ["end to end", "2.07"] and "2.07 images/s" in " ".join(summary(figures))
    computed = [["end to end, recipe's batch", "2.16"]] if micro_batches == 1 else []
    assert [row[1:3] for row in rows[1:]] == computed


@pytest.mark.parametrize(
    ("share", "noise", "line"),
    [
        (0.1, 0.02, "10.0% of the time of forward and backward"),
        (0.01, 0.02, "less than the noise of this measurement (2.0%)"),
        (-0.05, 0.02, "less than the noise of this measurement (5.0%)"),
    ],
)
def test_no_figure_is_printed_that_the_noise_exceeds(share: float, noise: float, line: str) -> None:
    assert engine_line(share, noise) == f"DeepSpeed's engine: {line}"


def test_at_zero_3_the_share_of_the_engine_is_not_measured() -> None:
    assert engine_line(None, None).startswith("DeepSpeed's engine: not measured at ZeRO 3")
