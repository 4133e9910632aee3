"""`maelstream export RUN --format F`: a run's weights for the reference's code, timm, or Hugging Face.

The result is a folder with weights, the configuration that the library reads, and a model card. It is written under
another name and then renamed, so it is complete or absent. Position tables are computed from the configuration, in
exact float32.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.reporting.model_card import model_card
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.export_formats import FORMATS, Format, write_json
from maelstream.jobs.weights.reading import EXPORT_NAME, mae_weights, read_weights
from maelstream.model.formats import describe_model, without_decoder
from maelstream.model.mae import position_tables
from maelstream.shards.durable import sync
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Export:
    """Write a run's weights in the format of another library, with a model card that says how to load them."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a run."""
    format: Format
    """reference: the names of the reference implementation, as safetensors and as `.pth`. timm: the encoder alone, as
    timm's ViT. hf: Hugging Face's ViTMAE."""
    out: Path | None = None
    """Folder to write, which may hold an older export; RUN/export/FORMAT-step-XXXXXXXX if not given."""
    step: int | None = None
    """Step of the checkpoint to export; the newest if not given."""
    encoder_only: bool = False
    """Leave out the decoder, which only reconstruction and further pre-training need."""


def export(folder: RunFolder, step: int, format: Format, encoder_only: bool, out: Path) -> None:
    """Exports the checkpoint of `step` to `out`; replaces an older export there.

    Raises:
        MaelstreamError: damaged weights, a model that the format cannot represent, or a folder `out` with other files.
    """
    if out.exists() and not (out / EXPORT_NAME).exists() and (not out.is_dir() or any(out.iterdir())):
        raise MaelstreamError(f"--out {out} holds files that are not an export; choose another folder")
    recipe = folder.recipe()
    stored = read_weights(folder.checkpoints.at(step))
    weights = mae_weights(stored, recipe.model) | position_tables(recipe.model)
    if encoder_only or format == "timm":
        weights = without_decoder(weights)
    unfinished, replaced = out.with_name(out.name + ".writing"), out.with_name(out.name + ".replaced")
    try:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
        card = FORMATS[format](unfinished, weights, recipe.model)
        write_json(unfinished / EXPORT_NAME, {"format": format, "step": step, "model": asdict(recipe.model)})
        (unfinished / "README.md").write_text(model_card(folder, step, describe_model(weights), card))
        for path in [*unfinished.iterdir(), unfinished]:
            sync(path)
        if out.exists():
            out.rename(replaced)
        unfinished.rename(out)
        sync(out.parent)
    except OSError as error:
        raise MaelstreamError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def main(args: list[str]) -> int:
    """Runs `maelstream export`; returns 0 when the folder is written."""
    command = parse_arguments(Export, args, "export")
    folder = RunFolder(command.run)
    folder.recipe()  # raises if RUN is not a pre-training run
    step = folder.last_step() if command.step is None else command.step
    if step not in (steps := folder.checkpoints.steps()):
        raise MaelstreamError(
            f"{folder.path} has no checkpoint of step {step}; give one of its steps: {', '.join(map(str, steps))}"
        )
    out = (command.out or folder.path / "export" / f"{command.format}-step-{step:08d}").resolve()
    export(folder, step, command.format, command.encoder_only, out)
    for path in sorted(out.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    return 0
