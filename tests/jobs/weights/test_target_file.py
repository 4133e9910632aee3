"""Target files: a file is read back unchanged, and one that does not fit is a one-line error."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maelstream.jobs.recipe import Recipe, RecipeError
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.target_file import TargetFile, read_target_file, run_target_file, tokenizer_file
from maelstream.model.config import MAEConfig
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.model.tokenizer import Decoder, Encoder, TokenizerConfig, initialise

TINY = MAEConfig(
    image_size=(32, 32), patch_size=8, dim=32, depth=1, heads=4, decoder_dim=16, decoder_depth=1, decoder_heads=2
)
PCA = dataclasses.replace(TINY, target="pca", components=24)
TOKEN = dataclasses.replace(TINY, target="token", codes=40)
SETTINGS = {"kind": "pca", "patch_size": 8, "in_chans": 3, "mean": list(TINY.mean), "std": list(TINY.std)}


def encoder(seed: int = 0) -> Encoder:
    model = Encoder(TokenizerConfig(codes=40, hidden=8))
    initialise(model, seed)
    return model


def write_pca(path: Path) -> TargetFile:
    tensors = {"components": torch.randn(24, 192), "mean": torch.randn(192), "variances": torch.rand(192)}
    TargetFile(path, tensors, SETTINGS).write(path)
    return read_target_file(path)


def test_a_file_is_read_back_unchanged(tmp_path: Path) -> None:
    file = write_pca(tmp_path / "new" / "pca.safetensors")
    again = read_target_file(file.path)
    assert again.settings == SETTINGS and again.fingerprint == file.fingerprint
    target = again.target(PCA)
    assert isinstance(target, PCATarget) and torch.equal(target.components, file.tensors["components"])


@pytest.mark.parametrize("form", ["encoder.pt", "encoder.safetensors"])
def test_an_encoder_with_dall_e_s_names_is_read_and_copied_as_safetensors(tmp_path: Path, form: str) -> None:
    weights, path = encoder().state_dict(), tmp_path / form
    if form.endswith(".pt"):
        torch.save(weights, path)
    else:
        save_file(weights, path, {"format": "pt"})
    file = read_target_file(path)
    file.write(tmp_path / "kept.safetensors")
    kept = read_target_file(tmp_path / "kept.safetensors")
    assert kept.fingerprint == file.fingerprint and not kept.shows_pixels
    images, numbers = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, -1)
    target = kept.target(TOKEN)
    assert isinstance(target, TokenTarget) and target.decoder is None
    read, original = file.target(TOKEN), TokenTarget(encoder(), None, (4, 4), 8, TINY.mean, TINY.std)
    expected = original.expected(images, images, numbers)
    assert torch.equal(target.expected(images, images, numbers), expected)
    assert torch.equal(read.expected(images, images, numbers), expected)


def test_a_fitted_tokenizer_includes_its_decoder(tmp_path: Path) -> None:
    decoder = Decoder(TokenizerConfig(codes=40, hidden=8))
    initialise(decoder, 0)
    path = tmp_path / "tokenizer.safetensors"
    tokenizer_file(path, encoder(), decoder, {"codes": 40}).write(path)
    file = read_target_file(path)
    target = file.target(TOKEN)
    assert file.shows_pixels and isinstance(target, TokenTarget) and target.decoder is not None
    codes = torch.rand(1, 40, 2, 2)
    assert torch.equal(target.decoder(codes), decoder(codes))


def test_the_error_for_a_pickled_module_says_how_to_convert_it(tmp_path: Path) -> None:
    torch.save(encoder(), tmp_path / "encoder.pkl")
    with pytest.raises(RecipeError, match=r"pickled module.*weights_only=False\)\.state_dict\(\)") as caught:
        read_target_file(tmp_path / "encoder.pkl")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_detected(tmp_path: Path) -> None:
    path = write_pca(tmp_path / "pca.safetensors").path
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]))
    with pytest.raises(RecipeError, match="is damaged"):
        read_target_file(path)
    path.write_bytes(whole[:100])
    with pytest.raises(RecipeError, match="is not a target file"):
        read_target_file(path)
    (tmp_path / "encoder.pt").write_bytes(b"PK")
    with pytest.raises(RecipeError, match=r"encoder\.pt") as caught:
        read_target_file(tmp_path / "encoder.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (dataclasses.replace(PCA, patch_size=4), "made for patch_size 8, the recipe's model.patch_size is 4"),
        (dataclasses.replace(PCA, components=23), "made for components 24, the recipe's model.components is 23"),
        (dataclasses.replace(PCA, in_chans=1, mean=(0.5,), std=(0.2,)), "made for in_chans 3"),
        (dataclasses.replace(PCA, mean=(0.5, 0.5, 0.5)), "made for mean"),
        (TOKEN, "holds the target pca, the recipe's model.target is token"),
    ],
)
def test_a_file_for_another_model_is_a_one_line_error(tmp_path: Path, config: MAEConfig, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint) as caught:
        write_pca(tmp_path / "pca.safetensors").target(config)
    assert "\n" not in str(caught.value) and "pca.safetensors" in str(caught.value)


def test_an_encoder_for_another_model_is_a_one_line_error(tmp_path: Path) -> None:
    weights, path = encoder().state_dict(), tmp_path / "encoder.pt"
    torch.save(weights, path)
    with pytest.raises(RecipeError, match=r"made for codes 40, the recipe's model\.codes is 41"):
        read_target_file(path).target(dataclasses.replace(TOKEN, codes=41))
    del weights["blocks.group_2.block_1.id_path.w"]
    torch.save(weights, path)
    with pytest.raises(RecipeError, match=r"holds no tokenizer.*group_2\.block_1\.id_path\.w") as caught:
        read_target_file(path).target(TOKEN)
    assert "\n" not in str(caught.value)


def test_the_error_for_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    for file, words in (("", "needs a target_file"), ("no.safetensors", "no.safetensors is missing")):
        recipe = Recipe(model=PCA, target_file=file)
        with pytest.raises(RecipeError, match=rf"{words}; `maelstream fit-pca data/imagenet-train --recipe") as caught:
            run_target_file(recipe, RunFolder(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="the target normalised_pixel uses none"):
        run_target_file(Recipe(target_file="pca.safetensors"), RunFolder(tmp_path))
