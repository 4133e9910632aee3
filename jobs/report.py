"""`maelstream report RUN [RUN ...]`: one HTML page of a run, or of several beside each other. It loads nothing.

Numbers and pictures are embedded; jobs/reporting/page/ holds the templates, the style and the script that draws the curves.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import tyro

from maelstream.jobs.arguments import parsed
from maelstream.jobs.recipe import dump_recipe
from maelstream.jobs.reporting.curves import Metrics, charts_of, curves_of, events_of
from maelstream.jobs.reporting.overview import (
    changed_keys,
    checkpoints,
    dataset_cards,
    differing_values,
    environment,
    evaluation_rows,
    heading,
    replaced_samples,
)
from maelstream.jobs.reporting.reconstruction_files import COLUMNS
from maelstream.jobs.reporting.report_images import album, data_uri
from maelstream.jobs.run_folder.environment import version
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.durable import written_whole
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Report:
    """Write RUN/report.html: state, curves, reconstructions, evaluations, recipe, data, checkpoints, environment.

    Of several runs, a page that compares them: curves on top of each other, what their recipes differ in, evaluations.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs."""
    out: Path | None = None
    """The page; if not given RUN/report.html, of several runs compare.html in the folder that holds the first."""
    verify: bool = False
    """Read every byte of the checkpoints, instead of comparing their sizes."""


def read_curves(folder: RunFolder) -> Metrics:
    """The log steps of a run; MaelstreamError for a folder that is none, or has logged none."""
    folder.any_recipe()
    if not (metrics := folder.read_metrics()):
        raise MaelstreamError(f"{folder.path} has logged no step yet; let it reach its first log step")
    return metrics


def page_of_run(folder: RunFolder, metrics: Metrics, verify: bool) -> str:
    """The report of one run, as HTML."""
    last = metrics[-1]
    epochs_a_step = last["epoch"] / last["step"]
    pictures = album(folder, epochs_a_step)
    quarantine_count, quarantine = replaced_samples(folder)
    told, starts = environment(folder)
    profile = folder.path / "profile.png"
    return _rendered(
        "run.html",
        [(folder, metrics)],
        [asdict(series) for series in pictures],
        run=heading(folder, metrics),
        title=f"{folder.path.resolve().name}: a run of maelstream",
        heads=COLUMNS,
        evaluation_rows=evaluation_rows([folder]),
        profile=data_uri(profile.read_bytes(), "png") if profile.exists() else None,
        differences=changed_keys(folder),
        recipe=dump_recipe(folder.any_recipe()),
        cards=dataset_cards(folder),
        quarantine_count=quarantine_count,
        quarantine=quarantine,
        checkpoints=checkpoints(folder, epochs_a_step, verify),
        environment=told,
        starts=starts,
    )


def page_of_runs(runs: list[tuple[RunFolder, Metrics]]) -> str:
    """The comparison of several, as HTML."""
    folders = [folder for folder, _ in runs]
    return _rendered(
        "compare.html",
        runs,
        [],
        runs=[heading(folder, metrics) for folder, metrics in runs],
        title=f"{len(runs)} runs of maelstream",
        evaluation_rows=evaluation_rows(folders),
        differences=differing_values(folders),
    )


def _rendered(
    template: str, drawn: list[tuple[RunFolder, Metrics]], pictures: list[dict[str, Any]], **context: Any
) -> str:
    """The page, with what its script draws."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("maelstream.jobs.reporting", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    lines = [
        {"name": str(folder.path), "curves": curves_of(metrics), "events": events_of(metrics)}
        for folder, metrics in drawn
    ]
    return templates.get_template(template).render(
        charts=charts_of([metrics for _, metrics in drawn]),
        pictures=pictures,
        data={"runs": lines, "pictures": pictures},
        version=version("maelstream"),
        written=time.strftime("%F %H:%M"),
        **context,
    )


def main(args: list[str]) -> int:
    """`maelstream report`; 0 when the page is written."""
    command = parsed(Report, args, "report")
    if not command.runs:
        raise MaelstreamError("RUN is missing; give the folder of a run, or of several")
    runs = [(folder := RunFolder(path), read_curves(folder)) for path in command.runs]
    if len(runs) == 1:
        page, out = page_of_run(*runs[0], command.verify), command.runs[0] / "report.html"
    else:
        page, out = page_of_runs(runs), command.runs[0].absolute().parent / "compare.html"
    out = command.out or out
    if not out.absolute().parent.is_dir():
        raise MaelstreamError(f"--out {out} cannot be written (there is no folder {out.parent})")
    with written_whole(out) as file:
        file.write(page.encode())
    print(f"{out}: {len(page) / 2**10:,.0f} KiB")
    return 0
