"""Renders the HTML report of one run, or the comparison of several.

A page loads nothing: numbers and images are embedded. `jobs/reporting/page/` holds the templates, the style sheet and
the script that draws the curves.
"""

import time
from dataclasses import asdict
from typing import Any

import jinja2

from maelstream.jobs.recipe import dump_recipe
from maelstream.jobs.reporting.curves import Metrics, available_charts, curve_points, event_positions
from maelstream.jobs.reporting.overview import (
    changed_values,
    checkpoint_rows,
    dataset_cards,
    differing_values,
    environment,
    evaluation_rows,
    replaced_samples,
    run_summary,
)
from maelstream.jobs.reporting.reconstruction_files import COLUMNS
from maelstream.jobs.reporting.report_images import data_uri, image_series
from maelstream.jobs.run_folder.environment import version
from maelstream.jobs.run_folder.folder import RunFolder


def run_page(folder: RunFolder, metrics: Metrics, verify: bool) -> str:
    """The report of one run; `verify` reads every byte of its checkpoints instead of comparing sizes."""
    last = metrics[-1]
    epochs_per_step = last["epoch"] / last["step"]
    series = image_series(folder, epochs_per_step)
    replaced_count, replaced = replaced_samples(folder)
    newest_start, starts = environment(folder)
    profile = folder.path / "profile.png"
    return _render(
        "run.html",
        [(folder, metrics)],
        [asdict(each) for each in series],
        run=run_summary(folder, metrics),
        title=f"{folder.path.resolve().name}: a maelstream run",
        columns=COLUMNS,
        evaluation_rows=evaluation_rows([folder]),
        profile=data_uri(profile.read_bytes(), "png") if profile.exists() else None,
        differences=changed_values(folder),
        recipe=dump_recipe(folder.any_recipe()),
        cards=dataset_cards(folder),
        replaced_count=replaced_count,
        replaced=replaced,
        checkpoints=checkpoint_rows(folder, epochs_per_step, verify),
        environment=newest_start,
        starts=starts,
    )


def comparison_page(runs: list[tuple[RunFolder, Metrics]]) -> str:
    """The comparison of several runs."""
    folders = [folder for folder, _ in runs]
    return _render(
        "compare.html",
        runs,
        [],
        runs=[run_summary(folder, metrics) for folder, metrics in runs],
        title=f"{len(runs)} maelstream runs",
        evaluation_rows=evaluation_rows(folders),
        differences=differing_values(folders),
    )


def _render(
    template: str, metrics_of_runs: list[tuple[RunFolder, Metrics]], series: list[dict[str, Any]], **context: Any
) -> str:
    """Fills a template; the page's script reads curves and images from the JSON in `data`."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("maelstream.jobs.reporting", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    curves = [
        {"name": str(folder.path), "curves": curve_points(metrics), "events": event_positions(metrics)}
        for folder, metrics in metrics_of_runs
    ]
    return templates.get_template(template).render(
        charts=available_charts([metrics for _, metrics in metrics_of_runs]),
        series=series,
        data={"runs": curves, "series": series},
        version=version("maelstream"),
        written=time.strftime("%F %H:%M"),
        **context,
    )
