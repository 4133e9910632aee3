"""Pictures that a run writes as it goes on: when, that they cost the training nothing, that their failure is told."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from maelstream.jobs.recipe import load_recipe
from maelstream.jobs.reporting.checkpoint_pictures import Gallery, is_due
from maelstream.jobs.reporting.pictures import read_about
from maelstream.jobs.run_folder.environment import read_starts
from maelstream.jobs.run_folder.folder import RunFolder
from tests.helpers.forked import run_ranks


def test_the_first_checkpoint_the_first_of_each_interval_and_the_last_are_shown() -> None:
    def chosen(every_steps: int, every_epochs: float, last: int) -> list[int]:
        shown: list[int] = []
        for step in [*range(every_steps, last, every_steps), last]:
            if is_due(step, shown, 10.0, every_epochs, last):
                shown.append(step)
        return shown

    assert chosen(5, 2, 75) == [5, 20, 40, 60, 75]
    assert chosen(30, 2, 100) == [30, 60, 90, 100]  # every checkpoint lies in an interval of its own
    assert chosen(7, 1.5, 40) == [7, 21, 35, 40]
    assert chosen(5, 0, 75) == []


@pytest.fixture(scope="module")
def shown(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """12 steps, 5 an epoch, a checkpoint every 2, on 2 ranks that share out the weights, too."""
    folder = tmp_path_factory.mktemp("gallery") / "run"
    options = ["--log.reconstruct-every-epochs", "1", "--checkpoint.every-steps", "2", "--engine.zero", "3"]
    run_ranks(2, tiny, "--run", str(folder), *options, output=folder.parent / "output")
    return RunFolder(folder)


def test_a_run_shows_its_checkpoints_and_says_of_what(shown: RunFolder) -> None:
    found = {path.name: read_about(path) for path in sorted(shown.reconstructions.iterdir())}
    assert list(found) == [f"step-{step:08d}" for step in (2, 6, 10, 12)]
    about = found["step-00000012"]
    assert about is not None and about.step == 12 and len(about.names) == 6
    assert list(about.losses) == ["0.75", "0.85"]  # of 16 patches, 95 % would leave none
    with Image.open(shown.reconstructions / "step-00000012" / "ratio-0.85.png") as sheet:
        assert sheet.size == (4 * 32 + 3 * 2, 6 * 32 + 5 * 2)


def test_training_is_bit_identical_with_and_without_pictures(shown: RunFolder, tiny: str, tmp_path: Path) -> None:
    plain = RunFolder(tmp_path / "run")
    options = ["--log.reconstruct-every-epochs", "0", "--checkpoint.every-steps", "2", "--engine.zero", "3"]
    run_ranks(2, tiny, "--run", str(plain.path), *options, output=tmp_path / "output")
    assert not plain.reconstructions.exists()
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in shown.read_metrics()] == [line[name] for line in plain.read_metrics()]
    ours, theirs = shown.checkpoints.weights(12), plain.checkpoints.weights(12)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_start_notes_where_and_with_what_it_is_carried_out(shown: RunFolder) -> None:
    (start,) = read_starts(shown)
    assert (start.step, start.ranks, start.ranks_a_host) == (0, 2, 2)
    assert start.packages["torch"] == torch.__version__.partition("+")[0] and start.cores >= 1 and start.processor


def test_pictures_that_cannot_be_written_are_a_warning(
    shown: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = RunFolder(tmp_path)
    copy.config.write_bytes(shown.config.read_bytes())
    copy.reconstructions.write_text("a file where the folder would be")
    (tmp_path / "checkpoints").symlink_to(shown.checkpoints.folder.resolve())
    Gallery(load_recipe(copy.config), copy, 60)(12, 12)
    said = capsys.readouterr().err
    assert "no pictures of step 12 (" in said and "training goes on" in said and said.count("\n") == 1
