"""`maelstream reconstruct`: ratios, nested masks, images of a folder, and the files that it writes."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maelstream.jobs.command import run
from maelstream.jobs.recipe import Recipe, dump_recipe, load_recipe
from maelstream.jobs.reconstruct import ratios_from
from maelstream.jobs.reporting.reconstruction import InputImages, folder_images, possible_ratios, reconstruct
from maelstream.jobs.reporting.reconstruction_files import (
    COLUMNS,
    NOTES,
    ReconstructionInfo,
    contact_sheet,
    read_info,
    write_reconstructions,
)
from maelstream.jobs.weights.tensor_files import report
from maelstream.model.config import MAEConfig, Target
from maelstream.model.formats import without_decoder
from maelstream.model.mae import MAE
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from tests.conftest import photograph, write_images

SMALL = MAEConfig((32, 32), 4, dim=24, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def input_images(count: int = 3) -> InputImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return InputImages("random", tuple(f"{n}" for n in range(count)), images, torch.arange(count))


def test_a_larger_ratio_hides_more_patches_and_reveals_none() -> None:
    results = reconstruct(MAE(SMALL), input_images(), [0.75, 0.85, 0.95])
    assert list(results) == ["0.75", "0.85", "0.95"]
    visible = [(result.masked == result.original).all(1) for result in results.values()]  # each (B, H, W)
    for fewer, more in zip(visible[1:], visible, strict=False):
        assert (more | ~fewer).all() and fewer.sum() < more.sum()
    assert torch.equal(results["0.75"].original, results["0.95"].original)


def test_the_recipe_ratio_gives_the_same_result_as_the_model() -> None:
    model = MAE(SMALL)
    images = input_images()
    found, expected = reconstruct(model, images, [0.75])["0.75"], model.reconstruct(images.images, images.keys)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert model.config.mask_ratio == 0.75


def test_a_normalised_prediction_is_shown_with_the_mean_and_deviation_of_the_original_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that predicts 0 for every patch shows the mean of each original patch; the note explains it."""
    model, images = MAE(SMALL), input_images()
    monkeypatch.setattr(model, "predict", lambda decoded: torch.zeros(*decoded.shape[:2], SMALL.target_dim))
    result = reconstruct(model, images, [0.75])["0.75"]
    std, mean = (torch.tensor(values)[:, None, None] for values in (SMALL.std, SMALL.mean))
    normalised = (images.images / 255 - mean) / std
    patches = normalised.unfold(2, 4, 4).unfold(3, 4, 4)  # (B, 3, gh, gw, 4, 4)
    means = patches.mean((1, 4, 5))[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)  # (B, 1, H, W)
    assert (result.reconstructed - (means * std + mean).clamp(0, 1)).abs().max() < 1e-6
    assert "mean and variance" in NOTES["normalised_pixel"]


def test_ratios_that_leave_no_patch_are_skipped_or_an_error_when_given() -> None:
    few = MAEConfig((32, 32), 8, dim=24, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    assert possible_ratios(few) == [0.75, 0.85] and possible_ratios(SMALL) == [0.75, 0.85, 0.95]
    assert possible_ratios(MAEConfig(mask="grid")) == [0.75]
    assert possible_ratios(MAEConfig(mask_ratio=0.6)) == [0.6, 0.75, 0.85, 0.95]
    assert ratios_from("0.85, 0.5", few) == [0.5, 0.85]
    for text, complaint in {"0.95": "leaves no patch visible", "0": "removes none", "x": "give numbers"}.items():
        with pytest.raises(MaelstreamError, match=complaint):
            ratios_from(text, few)


def test_a_contact_sheet_has_one_row_per_image_and_one_column_per_version() -> None:
    result = reconstruct(MAE(SMALL), input_images(), [0.75])["0.75"]
    sheet = contact_sheet(result)
    assert sheet.shape == (3 * 32 + 2 * 2, 4 * 32 + 3 * 2, 4)
    for column, images in enumerate(result[: len(COLUMNS)]):
        cell = sheet[34:66, 34 * column : 34 * column + 32]
        assert np.array_equal(cell[:, :, :3], (255 * images[1]).round().byte().permute(1, 2, 0).numpy())
    assert (sheet[32:34] == 0).all() and (sheet[:, 32:34] == 0).all()  # gaps are transparent


def test_reconstructions_replace_older_ones_and_are_ignored_until_complete(tmp_path: Path) -> None:
    results = reconstruct(MAE(SMALL), input_images(), [0.75, 0.85])
    info = ReconstructionInfo.describe(results, "step-00000004", 4, "random", ("0", "1", "2"), "normalised_pixel")
    write_reconstructions(tmp_path, results, info)
    assert read_info(tmp_path) == info
    write_reconstructions(tmp_path, {"0.75": results["0.75"]}, info)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "ratio-0.75.png"]
    (tmp_path / "about.json").write_text(json.dumps({"weights": "x"}))
    assert read_info(tmp_path) is None


def test_images_of_a_folder_are_evenly_spaced_and_other_files_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: str
) -> None:
    recipe = load_recipe(Path(tiny))
    folder = write_images(tmp_path / "images", classes=2, per_class=3)
    (folder / "notes.txt").write_text("not an image")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "z.gif")
    photograph(60, 40).save(folder / "zz.png")
    found = folder_images(folder, 9, recipe)
    assert found.names[0] == "class00/000.jpg" and found.names[-1] == "zz.png" and len(found.names) == 7
    assert found.images.shape == (7, 3, 32, 32) and found.images.dtype == torch.uint8
    err = capsys.readouterr().err
    assert "notes.txt is left out: not an image" in err and "z.gif is left out: a GIF file" in err
    assert folder_images(folder / "class00", 2, recipe).names == ("000.jpg", "002.jpg")
    expected = photograph(60, 40).crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(found.images[-1].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("content", ["missing", "empty", "text"])
def test_a_folder_without_images_is_a_one_line_error(tmp_path: Path, content: str) -> None:
    if content != "missing":
        (tmp_path / "images").mkdir()
    if content == "text":
        (tmp_path / "images" / "a.txt").write_text("a")
    with pytest.raises(MaelstreamError, match=r"--images .*images"):
        folder_images(tmp_path / "images", 4, Recipe())


def test_images_and_dataset_together_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: str
) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(Path(tiny).read_text())
    assert run("reconstruct", [str(tmp_path), "--images", "a", "--dataset", "b"]) == 2
    assert "give one" in capsys.readouterr().err


LOOSE = MAEConfig((32, 32), 4, dim=64, depth=2, heads=1, decoder_dim=32, decoder_depth=1, decoder_heads=1)
"""Its heads are those that are assumed for its width."""


def losses_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert run("reconstruct", list(args)) == 0
    return capsys.readouterr().out.partition("loss on removed patches ")[2]


@pytest.mark.parametrize("target", ["pixel", "normalised_pixel"])
def test_weights_without_a_run_are_reconstructed_as_the_run_reconstructs(
    tmp_path: Path, packed: Dataset, target: Target, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file says nothing about heads and target; the reference's own checkpoint has the target in its `args`."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(LOOSE, target=target)
    weights = MAE(config, seed=5).state_dict()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump_recipe(Recipe(model=config)))
    save_file(weights, checkpoint / "weights.safetensors")
    where = ["--dataset", packed.folder, "--count", "1", "--ratios", "0.75"]
    expected = losses_of(capsys, "run", *where)
    torch.save({"model": weights}, "mae_visualize_tiny.pth")
    torch.save(
        {"model": weights, "args": argparse.Namespace(norm_pix_loss=target == "normalised_pixel")}, "trained.pth"
    )
    norm_pix = ["--norm-pix"] if target == "normalised_pixel" else []
    assert losses_of(capsys, "mae_visualize_tiny.pth", *where, *norm_pix) == expected
    name = f"reconstruct-mae_visualize_tiny-{Path(packed.folder).name}"
    assert {path.name for path in (tmp_path / "runs" / name).iterdir()} >= {"grid.png", "about.json", "ratio-0.75.png"}
    assert losses_of(capsys, "trained.pth", *where, "--out", "x.png") == expected
    assert run("export", ["run", "--format", "hf", "--out", "hf"]) == 0
    (tmp_path / "hf" / "export.json").unlink()  # as others publish it
    report.cache_clear()
    assert losses_of(capsys, "hf", *where, "--out", "x.png") == expected


def test_what_is_assumed_about_a_file_is_said(
    tmp_path: Path, packed: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(MAE(LOOSE).state_dict(), tmp_path / "x.pth")
    where = ["--dataset", packed.folder, "--count", "1", "--ratios", "0.5", "--out", str(tmp_path / "x.png")]
    assert run("reconstruct", [str(tmp_path / "x.pth"), *where]) == 0
    assert "assumed: 1 heads (--heads), 1 decoder heads (--decoder-heads), plain pixels as" in capsys.readouterr().err
    given = ["--heads", "2", "--decoder-heads", "4", "--norm-pix"]
    report.cache_clear()
    assert run("reconstruct", [str(tmp_path / "x.pth"), *where, *given]) == 0
    assert "assumed" not in capsys.readouterr().err


def test_weights_that_cannot_be_shown_are_one_line(
    tmp_path: Path, packed: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = MAE(LOOSE).state_dict()
    torch.save(without_decoder(weights), tmp_path / "encoder.pth")
    torch.save(weights, tmp_path / "full.pth")
    torch.save(MAE(dataclasses.replace(LOOSE, target="pca", components=9)).state_dict(), tmp_path / "pca.pth")
    dataset = ["--dataset", packed.folder, "--count", "2"]
    for name, options, expected in (
        ("encoder.pth", dataset, "holds an encoder alone"),
        ("full.pth", [], "is not a run, so it has no images; give --images or --dataset"),
        ("full.pth", [*dataset, "--heads", "3"], "heads 3 does not divide dim 64; give --heads and --decoder-heads"),
        ("full.pth", [*dataset, "--weights", "x"], "is not a run: it has no config.yaml"),
        ("pca.pth", dataset, "decoder_pred.weight is (9, 32) where the model has (48, 32)"),
        ("nothing.pth", dataset, "nothing.pth cannot be read"),
    ):
        assert run("reconstruct", [str(tmp_path / name), *options]) == 2
        err = capsys.readouterr().err
        assert expected in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("x.txt", "its name must end in .png"),
        ("", "it is a folder"),
        ("file/x.png", "File exists"),
        ("sealed/x.png", "ermission denied"),
    ],
)
def test_out_is_checked_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, reason: str
) -> None:
    """The weights do not exist: a check after the work would report them first."""
    (tmp_path / "file").write_text("")
    (tmp_path / "sealed").mkdir(mode=0o555)
    if "sealed" in out and os.access(tmp_path / "sealed", os.W_OK):
        pytest.skip("root may write everywhere")
    assert run("reconstruct", [str(tmp_path / "no.pth"), "--images", "x", "--out", str(tmp_path / out)]) == 2
    printed = capsys.readouterr().err
    assert reason in printed and printed.count("\n") == 1


def test_out_makes_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reconstruct", [str(tmp_path / "no.pth"), "--images", "x", "--out", str(tmp_path / "a/b/x.png")]) == 2
    assert "no.pth" in capsys.readouterr().err and (tmp_path / "a" / "b").is_dir()
