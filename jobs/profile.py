"""`maelstream profile RECIPE`: each stage alone at its limit, then the whole; which stage holds the run back, and why.

Alone it is one rank; under `maelstream launch --nproc N profile RECIPE` every rank measures, at the same time as the
others, and rates are those of all ranks together. Nothing is trained: weights and moments are thrown away.
"""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import difflib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from maelstream.jobs.arguments import parsed
from maelstream.jobs.command import run
from maelstream.jobs.distributed.ranks import process_group, ranks_from_environment
from maelstream.jobs.profiling.measurement import measure, shown_size, streamed_by
from maelstream.jobs.profiling.stage_chart import draw, shown_rate
from maelstream.jobs.recipe import Recipe, RecipeError, load_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.target_file import target_of_run
from maelstream.pipeline.tracing import STAGES
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Profile:
    """Measure each stage of a recipe's run alone, then the whole, and tell what holds it back."""

    recipe_file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """A YAML file of recipes/, or your own; any key of it is an option."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    stages: str = ",".join(STAGES)
    """Which to measure. The whole is measured where `step` is among them."""
    seconds: float = 5.0
    """How long to measure each stage, and the whole; at the least a few batches."""
    out: Path = Path("profile.png")
    """The picture."""
    json: Path | None = None
    """Write all figures, too."""
    trace: Path | None = None
    """Write a trace of some steps, for https://ui.perfetto.dev; `.json` or `.json.gz`."""


def table(figures: dict[str, Any]) -> Table:
    """A row a stage."""
    machine = figures["machine"]
    title = f"{figures['recipe']} on {machine['name']}, {machine['cores']} cores, {figures['ranks']} ranks"
    result = Table(
        "stage", "images/s alone", "bytes/s", "of the limit", "busy in the run", "what limits it", title=title
    )
    whole = figures["whole"]
    spread = whole["images_per_s_with_the_recipe_s_batch"] if whole else None
    for name, stage in figures["stages"].items():
        alone, limit = stage["images_per_s"], stage["limit_images_per_s"]
        result.add_row(
            name,
            shown_rate(alone),
            shown_size(stage["bytes_per_s"]) if stage["bytes_per_s"] else "",
            f"{alone / limit:.0%}" if alone and limit else "",
            f"{spread / alone:.1%}" if alone and spread else "",
            stage["why"],
            style="bold" if name == figures["verdict"]["limit"] else "dim" if alone is None else "",
        )
    if whole:
        counts = figures["micro_batches"]
        rates = {"whole": (whole["images_per_s"], "")}
        if counts["measured"] != counts["recipe"]:
            why = f"computed: one update in {counts['recipe']} micro-batches, not in {counts['measured']}"
            rates["whole, the recipe's batch"] = whole["images_per_s_with_the_recipe_s_batch"], why
        for name, (rate, why) in rates.items():
            size = shown_size(rate * figures["bytes_an_image"])
            result.add_row(name, shown_rate(rate), size, "", "", why, style="bold")
    return result


def summary(figures: dict[str, Any]) -> list[str]:
    """What the table has no room for, and the verdict."""
    whole, machine = figures["whole"], figures["machine"]
    products = f"{machine['matrix_flops_per_s'] / 1e12:,.3g} TFLOP/s of {machine['matrix_dtype']} products"
    sheet = machine["datasheet_flops_per_s"]
    products += f" (its data sheet: {sheet / 1e12:,.0f})" if sheet else ""
    lines = [f"the machine: {products}, memory {shown_size(machine['memory_bytes_per_s'])}/s"]
    if whole is not None:
        counts = figures["micro_batches"]
        sheet = f", {whole['mfu_datasheet']:.1%} of the data sheet's" if whole["mfu_datasheet"] else ""
        gpu = f", GPU busy {whole['gpu_utilisation']:.0%}" if whole["gpu_utilisation"] is not None else ""
        held = f", {shown_size(whole['gpu_bytes'])} on the GPU" if whole["gpu_bytes"] is not None else ""
        lines += [
            f"the whole: {whole['steps']} steps of {counts['measured']} micro-batches (recipe: {counts['recipe']})"
            f" of {figures['micro_batch_size']} images a rank, {shown_rate(whole['images_per_s'])} images/s, "
            f"MFU {whole['mfu_measured']:.1%} of the measured rate{sheet}",
            f"data wait {whole['data_wait']:.2%}; of a step of {whole['step_s'] * 1e3:,.1f} ms: p50 "
            f"{whole['data_wait_p50_s'] * 1e3:.2f} ms, p99 {whole['data_wait_p99_s'] * 1e3:.2f} ms",
            f"cores busy {whole['cpu_utilisation']:.0%}{gpu}; memory {shown_size(whole['rss_bytes'])}{held}",
            f"DeepSpeed's engine around forward and backward: {whole['engine_share']:.1%} of its time",
        ]
    return [*lines, figures["verdict"]["words"]]


def stages_of(text: str) -> list[str]:
    """Names of stages; RecipeError for one that there is not."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, 1, cutoff=0.0)[0]
            raise RecipeError(f"--stages: there is no {name!r}; the nearest is {near!r} of {', '.join(STAGES)}")
    if not names:
        raise RecipeError(f"--stages names none of {', '.join(STAGES)}")
    return names


def main(args: list[str]) -> int:
    """`maelstream profile`."""
    default: Any = tyro.MISSING  # for --help
    if args and not args[0].startswith("-"):
        default = Profile(Path(args[0]), load_recipe(Path(args[0])))
    elif not {"-h", "--help"} & set(args):
        raise RecipeError("RECIPE comes first: `maelstream profile recipes/pretrain_vit_b16.yaml ...`")
    command = parsed(Profile, args, "profile", default)
    names, recipe = stages_of(command.stages), command.recipe
    if command.seconds <= 0:
        raise RecipeError(f"--seconds {command.seconds} must be more than 0")
    if command.trace is not None and "step" not in names:
        raise RecipeError("--trace records the whole, which --stages leaves out; name step, too")
    for option, file in (("--out", command.out), ("--json", command.json), ("--trace", command.trace)):
        if file is not None and not file.absolute().parent.is_dir():
            raise MaelstreamError(f"{option} {file} cannot be written (there is no folder {file.parent})")
    with tempfile.TemporaryDirectory() as empty:
        target_file = target_of_run(recipe, RunFolder(Path(empty)))
    target = None if target_file is None else target_file.target(recipe.model)
    ranks = ranks_from_environment()
    streamed_by(recipe, ranks)  # says what is wrong with the data before the ranks meet
    with process_group(ranks, recipe.health.silent_s) as control_group:
        figures = measure(recipe, target, names, command.seconds, control_group, command.trace)
    if ranks.rank > 0:
        return 0
    figures["recipe"] = command.recipe_file.stem
    console = Console()
    console.print(table(figures))
    for line in summary(figures):
        console.print(line)
    draw(figures, command.out)
    if command.json is not None:
        try:
            command.json.write_text(json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise MaelstreamError(f"--json {command.json} cannot be written ({error.strerror})") from None
    console.print(f"picture: {command.out}" + (f"; trace: {command.trace}" if command.trace is not None else ""))
    return 0


if __name__ == "__main__":
    sys.exit(run("profile", sys.argv[1:]))
