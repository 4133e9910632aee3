"""Results of a sweep: a table of means and deviations over seeds with the paper's numbers, a figure, JSON and CSV."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from maelstream.jobs.evaluation.results import Evaluation
from maelstream.jobs.sweeps.grid import Cell
from maelstream.shards.durable import atomic_write

_COLOUR = "#3b6fb6"


@dataclass(frozen=True)
class Outcome:
    """The results of one cell."""

    cell: Cell
    folder: str
    loss: float | None
    """The last loss of pre-training; None while it is unfinished."""
    results: dict[str, Evaluation | None]
    """Results by the name of the evaluation; None for an unfinished one."""


@dataclass(frozen=True)
class Spread:
    """Mean and deviation of one row over its seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for a single seed."""
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and deviation of the values; None if there are none."""
    if not values:
        return None
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def rows_of(found: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by row, in the order of the rows."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in found:
        rows.setdefault(outcome.cell.row, []).append(outcome)
    return rows


def top1(outcomes: Sequence[Outcome], name: str) -> Spread | None:
    """Top-1 of one evaluation in percent, over the seeds that have finished it."""
    return spread([result.top1 for outcome in outcomes if (result := outcome.results[name]) is not None])


def headings(names: Sequence[str]) -> dict[str, str]:
    """Column title of each evaluation: its job, with its options if the job occurs more than once."""
    jobs = [name.partition(" ")[0] for name in names]
    return {name: job if jobs.count(job) == 1 else name for name, job in zip(names, jobs, strict=True)}


def table(found: Sequence[Outcome], names: Sequence[str], title: str) -> Table:
    """One row per setting: the loss, the top-1 of each evaluation, and the paper's top-1 if the paper has the row."""
    jobs = {name: name.partition(" ")[0] for name in names}
    compared = [name for name in names if any(jobs[name] in outcome.cell.paper for outcome in found)]
    heads = headings(names)
    shown = Table(
        "row", "seeds", "loss", *heads.values(), *(f"paper, {jobs[name]} (ViT-L)" for name in compared), title=title
    )
    for row, outcomes in rows_of(found).items():
        loss = spread([outcome.loss for outcome in outcomes if outcome.loss is not None])
        done = sum(outcome.loss is not None for outcome in outcomes)
        paper = outcomes[0].cell.paper
        shown.add_row(
            row,
            f"{done}/{len(outcomes)}",
            "" if loss is None else f"{loss.mean:.4f}",
            *(str(top1(outcomes, name) or "") for name in names),
            *(f"{paper[jobs[name]]:.1f}" if jobs[name] in paper else "" for name in compared),
        )
    return shown


def draw(found: Sequence[Outcome], names: Sequence[str], title: str, path: Path) -> None:
    """Plots top-1 over the setting, one panel per evaluation, as in the paper's figures 5 and 7.

    If all evaluations are partial fine-tuning, one panel shows top-1 over the number of blocks, as in figure 9.
    """
    blocks = all(name.startswith("partial ") for name in names) and len(names) > 1
    panels = ["partial fine-tuning"] if blocks else list(names)
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in _series(found, names, panel, blocks).items():
            labels, spreads = zip(*points, strict=True)
            numeric = all(_is_number(label) for label in labels)
            positions = [float(text) for text in labels] if numeric and not blocks else list(range(len(labels)))
            errors = [one.deviation or 0.0 for one in spreads]
            means = [one.mean for one in spreads]
            line, colour = "-" if numeric else "none", None if blocks else _COLOUR
            axes.errorbar(positions, means, errors, marker="o", linestyle=line, capsize=3, label=label, color=colour)
            axes.set_xticks(positions, labels, rotation=0 if numeric else 30, ha="center" if numeric else "right")
        axes.set_ylabel("top-1 (%)")
        axes.set_xlabel("blocks fine-tuned" if blocks else title)
        axes.set_title(panel if blocks else headings(names)[panel])
        axes.grid(alpha=0.3)
        if blocks:
            axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _series(
    found: Sequence[Outcome], names: Sequence[str], panel: str, blocks: bool
) -> dict[str, list[tuple[str, Spread]]]:
    rows = rows_of(found)
    if blocks:
        return {
            row: points
            for row, outcomes in rows.items()
            if (points := [(name.rpartition(" ")[2], one) for name in names if (one := top1(outcomes, name))])
        }
    points = [
        (row.partition("=")[2] if row.count("=") == 1 else row, one)
        for row, outcomes in rows.items()
        if (one := top1(outcomes, panel))
    ]
    return {panel: points} if points else {}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_results(found: Sequence[Outcome], names: Sequence[str], folder: Path) -> None:
    """Writes `results.json` and `results.csv`: one entry per cell; the JSON file has the means of the rows too."""
    keys = list(dict.fromkeys(key for outcome in found for key in outcome.cell.setting))
    lines = [
        {"row": outcome.cell.row, "seed": outcome.cell.seed, "folder": outcome.folder, "loss": outcome.loss}
        | {key: outcome.cell.setting.get(key) for key in keys}
        | {name: result.top1 if (result := outcome.results[name]) else None for name in names}
        for outcome in found
    ]
    means = [
        {"row": row, "paper": outcomes[0].cell.paper}
        | {name: asdict(one) if (one := top1(outcomes, name)) else None for name in names}
        for row, outcomes in rows_of(found).items()
    ]
    with atomic_write(folder / "results.json") as file:
        file.write(json.dumps({"cells": lines, "rows": means}, indent=1).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    with atomic_write(folder / "results.csv") as file:
        file.write(text.getvalue().encode())
