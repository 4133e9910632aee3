"""`maelstream report RUN`: one HTML file of a run: curves, reconstructions, recipe. It loads nothing from outside."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")  # a file is written; a display is not asked for

import matplotlib.pyplot as plt
import tyro

from jobs.recipe import dump_recipe
from jobs.runfolder import RunFolder
from shards.errors import MaelstreamError

CURVES = {
    "loss": "loss on removed patches",
    "lr": "learning rate",
    "images_per_s": "images/s",
    "data_wait": "share of time waiting for data",
}
_STYLE = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"


@dataclass(frozen=True)
class Report:
    """Write RUN/report.html: curves, reconstructions and the recipe of a run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder."""


def curves_svg(metrics: list[dict[str, Any]]) -> str:
    """The curves over steps as one SVG element."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.5))
    for axis, (name, title) in zip(axes.flat, CURVES.items(), strict=True):
        axis.plot([line["step"] for line in metrics], [line[name] for line in metrics])
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue().partition("<svg")[2].join(["<svg", ""])


def page(folder: RunFolder, metrics: list[dict[str, Any]]) -> str:
    """The report as HTML."""
    last = metrics[-1]
    pictures = [
        f'<h2>Reconstructions, {path.stem}</h2><img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in sorted(folder.path.glob("reconstructions/*.png"))
    ]
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(str(folder.path))}</title>',
            f"<style>{_STYLE}</style><h1>{html.escape(str(folder.path))}</h1>",
            f"<p>Step {last['step']}, epoch {last['epoch']:.1f}: loss {last['loss']:.4f} (first logged "
            f"{metrics[0]['loss']:.4f}), {last['images_per_s']:,.0f} images/s.</p>",
            curves_svg(metrics),
            *pictures,
            f"<h2>Recipe</h2><pre>{html.escape(dump_recipe(folder.recipe()))}</pre></html>",
        ]
    )


def main(args: list[str]) -> int:
    """`maelstream report`; 0 when the page is written."""
    command = tyro.cli(Report, args=args, prog="maelstream report")
    folder = RunFolder(command.run)
    folder.recipe()  # before anything else: is it a run?
    # A skipped step has no loss.
    if not (metrics := [line for line in folder.read_metrics() if line["loss"] is not None]):
        raise MaelstreamError(f"{folder.path} has logged no step yet; let it reach its first log step")
    out = folder.path / "report.html"
    out.write_text(page(folder, metrics))
    print(out)
    return 0
