"""A wheel, installed into an empty environment, holds all that the commands read: recipes, page and SLURM template."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from safetensors.torch import save_file

from maelstream.model.config import MAEConfig
from maelstream.model.formats import without_decoder
from maelstream.model.mae import MAE
from maelstream.shards.dataset import Dataset

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and, by a path file, the packages that it depends on; its bin folder."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "data", "build", "golden", "measured")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(source), cwd=work)
    (wheel,) = work.glob("maelstream-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", str(work / "env"), cwd=work)
    python = work / "env" / "bin" / "python"
    run(*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel), cwd=work)
    site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=work).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


def test_a_wheel_holds_the_files_that_are_not_code(installed: Path, tmp_path: Path) -> None:
    script = """
from importlib.resources import files
import maelstream
from maelstream.jobs.recipe import RECIPES, load_any_recipe
from maelstream.jobs.sweeps.grid import grid_of
assert "site-packages" in maelstream.__file__, maelstream.__file__
assert files("maelstream.jobs.reporting").joinpath("page", "report.js").is_file()
assert files("maelstream.jobs").joinpath("slurm", "pretrain.sbatch").is_file()
print(len(list(RECIPES.rglob("*.yaml"))), len(grid_of("decoder_depth").rows))
"""
    recipes = len(list((ROOT / "recipes").rglob("*.yaml")))
    assert run(str(installed / "python"), "-c", script, cwd=tmp_path).split() == [str(recipes), "5"]


def test_commands_of_a_wheel_work(installed: Path, packed: Dataset, tmp_path: Path) -> None:
    maelstream = str(installed / "maelstream")
    assert "two ranks" in run(maelstream, "demo", "--help", cwd=tmp_path)
    assert "batch_size: 4096" in run(maelstream, "pretrain", "pretrain_vit_b16", "--print-config", cwd=tmp_path)
    model = MAE(MAEConfig((32, 32), 8, dim=64, depth=1, heads=1, decoder_dim=32, decoder_depth=1, decoder_heads=4))
    save_file(without_decoder(model.state_dict()), tmp_path / "encoder.safetensors")
    finetune = [maelstream, "finetune", "encoder.safetensors", packed.folder, packed.folder, "--print-config"]
    printed = run(*finetune, cwd=tmp_path)
    assert "job: finetune" in printed and "rand_augment: 9" in printed  # those of recipes/finetune/base.yaml
