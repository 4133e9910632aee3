"""Reconstructions during training: when they are made, that training is unchanged, and that errors are reported."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from maelstream.jobs.recipe import load_recipe
from maelstream.jobs.reporting.checkpoint_reconstructions import CheckpointReconstructor, is_due
from maelstream.jobs.reporting.reconstruction_files import read_info
from maelstream.jobs.run_folder.environment import read_starts
from maelstream.jobs.run_folder.folder import RunFolder
from tests.helpers.forked import run_ranks


def test_the_first_checkpoint_the_first_of_each_interval_and_the_last_are_due() -> None:
    def chosen(every_steps: int, every_epochs: float, last: int) -> list[int]:
        steps: list[int] = []
        for step in [*range(every_steps, last, every_steps), last]:
            if is_due(step, steps, 10.0, every_epochs, last):
                steps.append(step)
        return steps

    assert chosen(5, 2, 75) == [5, 20, 40, 60, 75]
    assert chosen(30, 2, 100) == [30, 60, 90, 100]  # each checkpoint is in another interval
    assert chosen(7, 1.5, 40) == [7, 21, 35, 40]
    assert chosen(5, 0, 75) == []


@pytest.fixture(scope="module")
def trained(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of 12 steps, 5 per epoch, with a checkpoint every 2 steps, on 2 ranks at ZeRO stage 3."""
    folder = tmp_path_factory.mktemp("reconstructor") / "run"
    options = ["--log.reconstruct-every-epochs", "1", "--checkpoint.every-steps", "2", "--engine.zero", "3"]
    run_ranks(2, tiny, "--run", str(folder), *options, output=folder.parent / "output")
    return RunFolder(folder)


def test_a_run_reconstructs_its_checkpoints_and_describes_them(trained: RunFolder) -> None:
    found = {path.name: read_info(path) for path in sorted(trained.reconstructions.iterdir())}
    assert list(found) == [f"step-{step:08d}" for step in (2, 6, 10, 12)]
    info = found["step-00000012"]
    assert info is not None and info.step == 12 and len(info.names) == 6
    assert list(info.losses) == ["0.75", "0.85"]  # removing 95 % of 16 patches would leave none
    with Image.open(trained.reconstructions / "step-00000012" / "ratio-0.85.png") as sheet:
        assert sheet.size == (4 * 32 + 3 * 2, 6 * 32 + 5 * 2)


def test_training_is_bit_identical_with_and_without_reconstructions(
    trained: RunFolder, tiny: str, tmp_path: Path
) -> None:
    plain = RunFolder(tmp_path / "run")
    options = ["--log.reconstruct-every-epochs", "0", "--checkpoint.every-steps", "2", "--engine.zero", "3"]
    run_ranks(2, tiny, "--run", str(plain.path), *options, output=tmp_path / "output")
    assert not plain.reconstructions.exists()
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in trained.read_metrics()] == [line[name] for line in plain.read_metrics()]
    found, expected = trained.checkpoints.weights(12), plain.checkpoints.weights(12)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_start_records_its_machine_and_versions(trained: RunFolder) -> None:
    (start,) = read_starts(trained)
    assert (start.step, start.ranks, start.ranks_a_host) == (0, 2, 2)
    assert start.packages["torch"] == torch.__version__.partition("+")[0] and start.cores >= 1 and start.processor


def test_reconstructions_that_cannot_be_written_are_a_warning(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = RunFolder(tmp_path)
    copy.config.write_bytes(trained.config.read_bytes())
    copy.reconstructions.write_text("a file instead of the folder")
    (tmp_path / "checkpoints").symlink_to(trained.checkpoints.folder.resolve())
    CheckpointReconstructor(load_recipe(copy.config), copy, 60)(12, 12)
    err = capsys.readouterr().err
    assert "no reconstructions of step 12 (" in err and "training continues" in err and err.count("\n") == 1
