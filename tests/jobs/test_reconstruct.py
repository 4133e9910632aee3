"""`maelstream reconstruct`: ratios, masks that are nested, images of a folder, and what a picture says of itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maelstream.jobs.command import run
from maelstream.jobs.recipe import Recipe, load_recipe
from maelstream.jobs.reconstruct import Shown, folder_images, possible_ratios, ratios_of, reconstructions
from maelstream.jobs.reporting.pictures import COLUMNS, NOTES, About, read_about, sheet, write_pictures
from maelstream.model.mae import MAE, MAEConfig
from maelstream.shards.errors import MaelstreamError
from tests.conftest import photograph, write_images

SMALL = MAEConfig((32, 32), 4, dim=24, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def shown(count: int = 3) -> Shown:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Shown("made up", tuple(f"{n}" for n in range(count)), images, torch.arange(count))


def test_a_larger_ratio_hides_more_of_the_same_images_and_shows_no_other_patch() -> None:
    results = reconstructions(MAE(SMALL), shown(), [0.75, 0.85, 0.95])
    assert list(results) == ["0.75", "0.85", "0.95"]
    visible = [(result.masked == result.original).all(1) for result in results.values()]  # of each (B, H, W)
    for fewer, more in zip(visible[1:], visible, strict=False):
        assert (more | ~fewer).all() and fewer.sum() < more.sum()
    assert torch.equal(results["0.75"].original, results["0.95"].original)


def test_the_recipe_s_own_ratio_gives_what_the_model_itself_gives() -> None:
    model = MAE(SMALL)
    images = shown()
    ours, own = (
        reconstructions(model, images, [0.75])["0.75"],
        model.reconstruct(images.images, images.keys),
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, own, strict=True))
    assert model.config.mask_ratio == 0.75


def test_a_normalised_prediction_is_shown_with_the_mean_and_spread_of_the_original_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that predicts 0, the mean of every patch, shows the original's patch means; the picture says so."""
    model, images = MAE(SMALL), shown()
    monkeypatch.setattr(model, "predict", lambda decoded: torch.zeros(*decoded.shape[:2], SMALL.target_dim))
    result = reconstructions(model, images, [0.75])["0.75"]
    std, mean = (torch.tensor(values)[:, None, None] for values in (SMALL.std, SMALL.mean))
    normalised = (images.images / 255 - mean) / std
    patches = normalised.unfold(2, 4, 4).unfold(3, 4, 4)  # (B, 3, gh, gw, 4, 4)
    means = patches.mean((1, 4, 5))[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)  # (B, 1, H, W)
    assert (result.reconstructed - (means * std + mean).clamp(0, 1)).abs().max() < 1e-6
    assert "mean and variance" in NOTES["normalised_pixel"]


def test_ratios_that_leave_no_patch_are_left_out_unless_they_are_asked_for() -> None:
    few = MAEConfig((32, 32), 8, dim=24, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    assert possible_ratios(few) == [0.75, 0.85] and possible_ratios(SMALL) == [0.75, 0.85, 0.95]
    assert possible_ratios(MAEConfig(mask="grid")) == [0.75]
    assert possible_ratios(MAEConfig(mask_ratio=0.6)) == [0.6, 0.75, 0.85, 0.95]
    assert ratios_of("0.85, 0.5", few) == [0.5, 0.85]
    for text, complaint in {"0.95": "leaves no patch visible", "0": "removes none", "x": "give shares"}.items():
        with pytest.raises(MaelstreamError, match=complaint):
            ratios_of(text, few)


def test_a_sheet_has_a_row_an_image_and_a_column_each_of_four_pictures() -> None:
    result = reconstructions(MAE(SMALL), shown(), [0.75])["0.75"]
    drawn = sheet(result)
    assert drawn.shape == (3 * 32 + 2 * 2, 4 * 32 + 3 * 2, 4)
    for column, images in enumerate(result[: len(COLUMNS)]):
        cell = drawn[34:66, 34 * column : 34 * column + 32]
        assert np.array_equal(cell[:, :, :3], (255 * images[1]).round().byte().permute(1, 2, 0).numpy())
    assert (drawn[32:34] == 0).all() and (drawn[:, 32:34] == 0).all()  # gaps are transparent


def test_pictures_replace_older_ones_and_count_only_when_they_are_whole(tmp_path: Path) -> None:
    results = reconstructions(MAE(SMALL), shown(), [0.75, 0.85])
    about = About.of(results, "step-00000004", 4, "made up", ("0", "1", "2"), "normalised_pixel")
    write_pictures(tmp_path, results, about)
    assert read_about(tmp_path) == about
    write_pictures(tmp_path, {"0.75": results["0.75"]}, about)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "ratio-0.75.png"]
    (tmp_path / "about.json").write_text(json.dumps({"weights": "x"}))
    assert read_about(tmp_path) is None


def test_images_of_a_folder_are_taken_evenly_and_what_is_none_is_told_of(
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
    said = capsys.readouterr().err
    assert "notes.txt is left out: not an image" in said and "z.gif is left out: a GIF file" in said
    assert folder_images(folder / "class00", 2, recipe).names == ("000.jpg", "002.jpg")
    expected = photograph(60, 40).crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(found.images[-1].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("content", ["missing", "empty", "text"])
def test_a_folder_without_images_gets_one_line(tmp_path: Path, content: str) -> None:
    if content != "missing":
        (tmp_path / "images").mkdir()
    if content == "text":
        (tmp_path / "images" / "a.txt").write_text("a")
    with pytest.raises(MaelstreamError, match=r"--images .*images"):
        folder_images(tmp_path / "images", 4, Recipe())


def test_images_from_two_places_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: str) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(Path(tiny).read_text())
    assert run("reconstruct", [str(tmp_path), "--images", "a", "--dataset", "b"]) == 2
    assert "give one" in capsys.readouterr().err
