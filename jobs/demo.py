"""`maelstream demo`: the whole process on a small scale, with the commands that a user would type.

Photographs -> shards -> a small MAE on two ranks, stopped and resumed -> reconstructions and a report.
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from maelstream.jobs.arguments import check_output_folder, parse_arguments
from maelstream.jobs.recipe import RECIPES
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError

STEPS = 800
RECIPE = RECIPES / "pretrain" / "demo.yaml"
# Photographs in scikit-image and scikit-learn. Diagrams are left out, and so are textures: their patches are unrelated.
_SKIMAGE = "astronaut camera chelsea coffee coins hubble_deep_field ihc moon motorcycle_left retina rocket"
_SKLEARN = "china flower"


@dataclass(frozen=True)
class Demo:
    """Pack real images, pre-train a small MAE on two ranks, resume it once, and show the result."""

    src: Path | None = None
    """A folder of images, one folder per class; crops of scikit-image's photographs if not given."""
    out: Path = Path("runs/demo")
    """Folder for all output; files of an earlier demo there are replaced."""


def photographs() -> dict[str, Path]:
    """Image files in installed packages, by name; MaelstreamError when scikit-image or scikit-learn is missing."""
    try:
        import skimage
        import sklearn
    except ImportError as error:
        raise MaelstreamError(
            f"{error}: the demo's photographs are in scikit-image and scikit-learn; "
            "`pip install maelstream[dev]`, or give a folder of images with --src"
        ) from None
    folders = {
        Path(skimage.__file__).parent / "data": _SKIMAGE.split(),
        Path(sklearn.__file__).parent / "datasets" / "images": _SKLEARN.split(),
    }
    return {name: next(folder.glob(f"{name}.*")) for folder, names in folders.items() for name in names}


def write_crops(out: Path, per_photograph: int, seed: int) -> None:
    """Writes JPEG crops of many sizes and qualities, one folder per photograph; the same files for the same seed."""
    random = np.random.default_rng(seed)
    for name, path in photographs().items():
        folder = out / name
        folder.mkdir(parents=True)
        with Image.open(path) as file:
            photograph = file if file.mode in ("L", "RGB") else file.convert("RGB")  # gray stays gray
            photograph.load()
        for number in range(per_photograph):
            width, height = (int(random.integers(min(side, 160), min(side, 480) + 1)) for side in photograph.size)
            left, top = (
                int(random.integers(0, a - b + 1)) for a, b in zip(photograph.size, (width, height), strict=True)
            )
            crop = photograph.crop((left, top, left + width, top + height))
            crop.save(folder / f"{number:03d}.jpg", quality=int(random.integers(75, 96)))


def clear(out: Path, src: Path | None) -> None:
    """Empties an earlier demo's folder; MaelstreamError for a folder that no demo wrote, or that contains `src`."""
    marker = out / ".maelstream-demo"
    if src is not None and out.resolve() in [src.resolve(), *src.resolve().parents]:
        raise MaelstreamError(f"--src {src} is inside --out {out}, which the demo empties; choose another --out")
    if out.exists() and not marker.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MaelstreamError(f"--out {out} holds files that no demo wrote; choose another folder")
    check_output_folder("--out", out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()


def run_command(*command: str) -> None:
    """Prints a command and runs it as a user would; MaelstreamError when it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    scripts = Path(sys.executable).parent  # so that it works when the environment is not activated
    path = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    code = subprocess.run(command, env=os.environ | {"PATH": path}).returncode
    if code:
        raise MaelstreamError(f"`{shlex.join(command)}` failed with exit code {code}; see its output above")


def main(args: list[str]) -> int:
    """Runs `maelstream demo`; returns 0 when the loss fell clearly and everything is written."""
    command = parse_arguments(Demo, args, "demo")
    if command.src is not None and not command.src.is_dir():
        raise MaelstreamError(f"--src {command.src} is not a folder; give one that holds images")
    clear(command.out, command.src)
    shards, run = command.out / "shards", command.out / "run"
    held_out: list[str] = []
    if command.src is None:
        write_crops(command.out / "photographs", per_photograph=40, seed=0)
        write_crops(command.out / "photographs-held-out", per_photograph=1, seed=1)
        run_command("maelstream", "pack", str(command.out / "photographs-held-out"), str(command.out / "held-out"))
        held_out = ["--dataset", str(command.out / "held-out")]
    run_command("maelstream", "pack", str(command.src or command.out / "photographs"), str(shards))
    run_command("maelstream", "info", str(shards))

    import torch  # imported late: torch takes seconds, and packing does not need it

    from maelstream.jobs.recipe import load_recipe
    from maelstream.jobs.run_folder.folder import RunFolder

    ranks = min(2, torch.cuda.device_count() or 2)
    # The same number of steps for any number of images, so that the demo takes equally long with any --src.
    epochs = (STEPS - 0.5) * load_recipe(RECIPE).optim.batch_size / len(Dataset.open(shards))
    schedule = ["--optim.epochs", f"{epochs:.4f}", "--optim.warmup-epochs", f"{epochs / 10:.4f}"]
    launch = ["maelstream", "launch", "--nproc", str(ranks)]
    pretrain = [*launch, "pretrain", str(RECIPE), "--run", str(run), "--data.dataset", str(shards), *schedule]
    run_command(*pretrain, "--stop-at-step", str(STEPS // 4))
    run_command(*pretrain)
    run_command("maelstream", "reconstruct", str(run), *held_out)
    run_command("maelstream", "report", str(run), "--verify")

    metrics = RunFolder(run).read_metrics()
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    rates = sorted(line["images_per_s"] for line in metrics)
    print(
        f"\nloss on removed patches {first:.3f} -> {last:.3f} in {metrics[-1]['step']} steps on {ranks} ranks, "
        f"{rates[len(rates) // 2]:,.0f} images/s (median)\n"
        f"reconstructions  {run / 'reconstructions'}\nreport           {run / 'report.html'}"
    )
    if last > 0.6 * first:
        raise MaelstreamError(
            f"the loss fell only from {first:.3f} to {last:.3f}; the demo expects at most 60 % of the first"
        )
    return 0
