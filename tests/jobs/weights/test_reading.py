"""Weights are read from every kind of folder and file; each kind of bad input has its own message."""

import argparse
import dataclasses
import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from maelstream.jobs.checkpointing.digest import digest_of
from maelstream.jobs.checkpointing.store import WEIGHTS
from maelstream.jobs.recipe import Recipe, dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.export_names import EXPORT_NAME
from maelstream.jobs.weights.reading import (
    StoredWeights,
    WeightsError,
    classifier_from_encoder,
    mae_weights,
    read_weights,
)
from maelstream.model.config import ClassifierConfig, MAEConfig
from maelstream.model.formats import to_hf, without_decoder
from maelstream.model.mae import MAE
from maelstream.model.position import interpolate_table

TINY = MAEConfig((32, 32), patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
CLASSES = ClassifierConfig(classes=3, image_size=(32, 32), patch_size=8, dim=32, depth=2, heads=2)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return MAE(TINY, seed=4).state_dict()


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    """A run with a checkpoint, which holds only parameters because the tables never change."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000012"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump_recipe(Recipe(model=TINY)))
    trained = {name: tensor for name, tensor in weights.items() if not name.endswith("pos_embed")}
    save_file(trained, checkpoint / "weights.safetensors")
    return tmp_path / "run"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_run_its_checkpoint_and_the_file_in_it_give_the_same_weights(
    folder: Path, weights: dict[str, Tensor]
) -> None:
    checkpoint = folder / "checkpoints" / "step-00000012"
    for path in (folder, checkpoint, checkpoint / "weights.safetensors"):
        stored = read_weights(path)
        assert_same(mae_weights(stored, TINY), weights)
        assert stored.grid == (4, 4)


def test_weights_that_changed_after_the_run_wrote_them_are_an_error(folder: Path) -> None:
    store = RunFolder(folder).checkpoints
    writing = store.at(12).rename(folder / "writing")
    store.publish(writing, 12, {WEIGHTS: digest_of(writing / WEIGHTS)})
    read_weights(folder)
    with (store.at(12) / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")  # 1.0: a plausible value, which only the digest detects
    for path in (folder, store.at(12), store.at(12) / WEIGHTS):
        with pytest.raises(WeightsError, match=r"step-00000012: weights.safetensors is damaged: its SHA-256"):
            read_weights(path)


@pytest.mark.parametrize("where", ["x.pth", "x.safetensors", "x/model.safetensors", "x/pytorch_model.bin"])
@pytest.mark.parametrize("names", ["reference", "hf"])
def test_files_and_folders_from_other_libraries_are_read(
    tmp_path: Path, weights: dict[str, Tensor], where: str, names: str
) -> None:
    renamed = to_hf(weights) if names == "hf" else weights
    (file := tmp_path / where).parent.mkdir(exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(renamed, file)
    else:
        torch.save(renamed, file)
    assert_same(mae_weights(read_weights(file if where.startswith("x.") else file.parent), TINY), weights)


def test_training_checkpoints_of_the_reference_are_read(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """They also hold the command line as an `argparse.Namespace`, and the optimizer's state."""
    content = {
        "model": weights,
        "optimizer": {"state": {0: {"step": 3}}},
        "epoch": 7,
        "args": argparse.Namespace(lr=1.0),
    }
    torch.save(content, tmp_path / "checkpoint-7.pth")
    assert_same(read_weights(tmp_path / "checkpoint-7.pth").tensors, weights)


def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "was-run"),)

    for content, name in ((Code(), r"posix\.mkdir"), (Fraction(1, 3), r"fractions\.Fraction")):
        torch.save({"model": weights, "args": content}, tmp_path / "evil.pth")
        with pytest.raises(WeightsError, match=rf"evil\.pth holds code \({name}\) next to its tensors") as caught:
            read_weights(tmp_path / "evil.pth")
        assert "\n" not in str(caught.value) and not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_empty_or_foreign_file_is_a_one_line_error(
    tmp_path: Path, weights: dict[str, Tensor], suffix: str
) -> None:
    file = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save({"model": weights}, file)
    else:
        save_file(weights, file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=r"fetch it again|as plain tensors"):
            read_weights(file)


def test_a_path_without_weights_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nothing\.pth cannot be read"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match="holds no weights: it is not a run"):
        read_weights(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list instead of a dict of tensors"):
        read_weights(tmp_path / "list.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match=r"resnet\.pth: not MAE weights: .* \(the first names are conv1\.weight\)"):
        read_weights(tmp_path / "resnet.pth")


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_named_in_the_error(
    tmp_path: Path, weights: dict[str, Tensor], value: float
) -> None:
    weights["decoder_blocks.0.mlp.fc2.weight"][3, 4] = value
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"NaN or infinity in decoder_blocks\.0\.mlp\.fc2\.weight; use weights"):
        read_weights(tmp_path / "x.safetensors")


def test_an_encoder_alone_can_only_be_fine_tuned(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"model": without_decoder(weights)}, tmp_path / "mae_pretrain_tiny.pth")
    stored = read_weights(tmp_path / "mae_pretrain_tiny.pth")
    with pytest.raises(WeightsError, match=r"holds an encoder alone .* reconstruction needs a decoder"):
        mae_weights(stored, TINY)
    classifier = classifier_from_encoder(stored, CLASSES)
    assert torch.equal(classifier.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    assert torch.equal(classifier.fc_norm.weight, torch.ones(32))


def test_the_error_for_another_size_names_the_tensors_and_the_likely_model(tmp_path: Path) -> None:
    large = dataclasses.replace(TINY, dim=64, depth=3, decoder_depth=2)
    save_file(MAE(large).state_dict(), tmp_path / "x.safetensors")
    stored = read_weights(tmp_path / "x.safetensors")
    expected = (
        r"x\.safetensors looks like ViT/8 \(64 x 3\), 32 x 32 px, decoder 16 x 2, and the model is ViT/8 \(32 x 2\), "
        r"32 x 32 px, decoder 16 x 1: cls_token is \(1, 1, 64\) where the model has \(1, 1, 32\); .* and \d+ more$"
    )
    with pytest.raises(WeightsError, match=expected):
        mae_weights(stored, TINY)
    with pytest.raises(WeightsError, match=r"cls_token is \(1, 1, 64\) where the model has \(1, 1, 32\)"):
        classifier_from_encoder(stored, CLASSES)


def test_tables_of_other_grids_are_interpolated_where_the_grid_is_known(folder: Path, tmp_path: Path) -> None:
    """A run and an export store their grid; for a file alone it is known only if it is square."""
    wide = dataclasses.replace(TINY, image_size=(16, 40))
    weights = MAE(wide).state_dict()
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"x\.safetensors: its position table has no square grid"):
        classifier_from_encoder(read_weights(tmp_path / "x.safetensors"), CLASSES)
    (folder / "config.yaml").write_text(dump_recipe(Recipe(model=wide)))
    (tmp_path / EXPORT_NAME).write_text(json.dumps({"model": dataclasses.asdict(wide)}))
    for path in (folder, tmp_path / "x.safetensors"):
        table = classifier_from_encoder(read_weights(path), CLASSES).pos_embed
        assert torch.equal(table, interpolate_table(weights["pos_embed"], (2, 5), (4, 4)))


def test_a_checkpoint_outside_its_run_lacks_the_position_table(folder: Path, tmp_path: Path) -> None:
    file = folder / "checkpoints" / "step-00000012" / "weights.safetensors"
    file.rename(tmp_path / "alone.safetensors")
    with pytest.raises(WeightsError, match=r"alone\.safetensors has no position table.*give the run's folder"):
        read_weights(tmp_path / "alone.safetensors")


def test_tensors_of_no_vit_are_a_one_line_error(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    for name, tensor in {"patch_embed.proj.weight": torch.zeros(32, 192), "pos_embed": torch.zeros(17, 32)}.items():
        save_file(weights | {name: tensor}, tmp_path / "x.safetensors")
        with pytest.raises(WeightsError, match=rf"{name} is \(\d+, \d+\); a ViT has"):
            read_weights(tmp_path / "x.safetensors")
    save_file({"cls_token": weights["cls_token"]}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"patch_embed\.proj\.weight is missing"):
        read_weights(tmp_path / "x.safetensors")


def test_an_export_with_a_damaged_or_wrong_description_is_a_one_line_error(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    save_file(weights, tmp_path / "weights.safetensors")
    for text in ("{", "{}", '{"model": {"dim": 7}}'):
        (tmp_path / EXPORT_NAME).write_text(text)
        with pytest.raises(WeightsError, match=rf"{EXPORT_NAME} is damaged, or of another version"):
            read_weights(tmp_path)
    other = dataclasses.replace(TINY, image_size=(48, 48))
    (tmp_path / EXPORT_NAME).write_text(json.dumps({"model": dataclasses.asdict(other)}))
    with pytest.raises(WeightsError, match="does not fit 6 x 6 patches"):
        classifier_from_encoder(read_weights(tmp_path), CLASSES)


def test_half_precision_weights_become_float32_in_the_classifier(weights: dict[str, Tensor]) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    model = classifier_from_encoder(StoredWeights(Path("x"), halves, (4, 4)), CLASSES)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.cls_token, weights["cls_token"].bfloat16().float())
