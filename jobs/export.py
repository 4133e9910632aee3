"""`maelstream export RUN --format F`: a run's weights for the reference's code, timm, or Hugging Face.

RUN is a run of pre-training, or of training on labels, whose classifier is exported.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from maelstream.jobs.arguments import parse_arguments
from maelstream.jobs.recipe import Recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.export_names import EXPORT_NAME, Format
from maelstream.shards.durable import can_write
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Export:
    """Write a run's weights in the format of another library, with a model card that says how to load them."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a run, of pretrain or of training on labels."""
    format: Format
    """reference: the names of the reference implementation, as safetensors and as `.pth`. timm: timm's ViT, the encoder
    alone or the classifier. hf: Hugging Face's ViTMAE, or ViTForImageClassification."""
    out: Path | None = None
    """Folder to write, which may hold an older export; RUN/export/FORMAT-step-XXXXXXXX if not given."""
    step: int | None = None
    """Step of the checkpoint to export; the newest if not given."""
    encoder_only: bool = False
    """Leave out the decoder, which only reconstruction and further pre-training need."""
    ema: bool = False
    """Of a run that keeps an exponential moving average of its weights (scratch): export the average."""


def main(args: list[str]) -> int:
    """Runs `maelstream export`; returns 0 when the folder is written."""
    command = parse_arguments(Export, args, "export")
    folder = RunFolder(command.run)
    recipe = folder.any_recipe()
    step = folder.last_step() if command.step is None else command.step
    if step not in (steps := folder.checkpoints.steps()):
        raise MaelstreamError(
            f"{folder.path} has no checkpoint of step {step}; give one of its steps: {', '.join(map(str, steps))}"
        )
    out = (command.out or folder.path / "export" / f"{command.format}-step-{step:08d}").resolve()
    if out.exists() and not (out / EXPORT_NAME).exists() and (not out.is_dir() or any(out.iterdir())):
        raise MaelstreamError(f"--out {out} holds files that are not an export; choose another folder")
    if not can_write(out.parent):
        raise MaelstreamError(f"--out {out} cannot be written (permission denied); choose another folder")
    if isinstance(recipe, Recipe) and command.ema:
        raise MaelstreamError(f"{folder.path} is a run of pretrain, which keeps no moving average; leave out --ema")
    if not isinstance(recipe, Recipe) and command.encoder_only:
        raise MaelstreamError(f"{folder.path} is a run of {recipe.job}, which has no decoder to leave out")
    from maelstream.jobs.reporting.exporting import export, exported_classifier, exported_mae  # imports torch

    if isinstance(recipe, Recipe):
        exported = exported_mae(folder, recipe, step, command.format, command.encoder_only)
    else:
        exported = exported_classifier(folder, recipe, step, command.format, command.ema)
    export(folder, step, command.format, exported, out)
    for path in sorted(out.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    return 0
