"""Runs that start from given weights (`--init`), and runs whose checkpoints are on another disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maelstream.jobs.command import run
from maelstream.jobs.recipe import load_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.model.config import MAEConfig
from maelstream.model.mae import MAE
from maelstream.shards.errors import MaelstreamError
from tests.helpers.forked import run_ranks

TINY = MAEConfig((32, 32), patch_size=8, dim=48, depth=2, heads=3, decoder_dim=32, decoder_depth=1, decoder_heads=4)


def test_a_run_continues_from_weights_and_resumes_without_the_file(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 0 has the given weights; stopped and resumed without the file, the run ends with the same bits."""
    weights, file = MAE(TINY, seed=7).state_dict(), tmp_path / "w.safetensors"
    save_file(weights, file)
    options = ["--engine.precision", "fp32", "--log.reconstruct-every-epochs", "0"]
    still = [tiny, "--run", str(tmp_path / "still"), "--init", str(file), "--stop-at-step", "1", *options]
    run_ranks(1, *still, "--optim.base-lr", "0", output=tmp_path / "output")
    found = load_file(tmp_path / "still" / "checkpoints" / "step-00000001" / "weights.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())
    whole = [tiny, "--run", str(tmp_path / "whole"), "--init", str(file), "--stop-at-step", "6", *options]
    run_ranks(1, *whole, output=tmp_path / "output")
    parts = [tiny, "--run", str(tmp_path / "parts"), *options]
    run_ranks(1, *parts, "--init", str(file), "--stop-at-step", "3", output=tmp_path / "output")
    file.unlink()
    run_ranks(1, *parts, "--stop-at-step", "6", output=tmp_path / "output")
    recorded = load_recipe(tmp_path / "parts" / "config.yaml")
    assert recorded == load_recipe(tmp_path / "whole" / "config.yaml") and recorded.init == str(file)
    expected, resumed = (RunFolder(tmp_path / name).checkpoints.weights(6) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    capsys.readouterr()
    assert run("pretrain", [*parts, "--init", str(tmp_path / "still")]) == 2
    assert "holds a run that started from" in capsys.readouterr().err


def test_a_run_trains_and_resumes_when_its_checkpoints_are_on_another_disk(tmp_path: Path, tiny: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (tmp_path / "disk").mkdir()
    folder.checkpoints.folder.symlink_to(tmp_path / "disk")
    command = [tiny, "--run", str(folder.path), "--log.reconstruct-every-epochs", "0"]
    run_ranks(1, *command, "--stop-at-step", "4", output=tmp_path / "output")
    checkpoint = folder.checkpoints.at(4)
    checkpoint.rename(tmp_path / "first")
    checkpoint.symlink_to(tmp_path / "first")  # pruned later: two checkpoints are kept
    run_ranks(1, *command, "--stop-at-step", "12", output=tmp_path / "output")
    assert folder.checkpoints.steps() == [8, 12] and (tmp_path / "disk" / "step-00000012").is_dir()
    assert run("export", [str(folder.path), "--format", "timm"]) == 0
    assert run("report", [str(folder.path)]) == 0
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    with pytest.raises(MaelstreamError, match=r"checkpoints is a link to .*disk, which is no folder; mount its disk"):
        folder.checkpoints.steps()
    assert run("pretrain", command) == 2
