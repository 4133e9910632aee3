"""Configurations next to weights: Hugging Face's, timm's, a run's; and links that lead to them."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from maelstream.jobs.checkpointing.digest import digest_of
from maelstream.jobs.checkpointing.store import STATE, WEIGHTS
from maelstream.jobs.recipe import ClassificationRecipe, Recipe, dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.reading import (
    WeightsError,
    classifier_from_encoder,
    classifier_values,
    encoder_values,
    read_weights,
    stored_classifier,
)
from maelstream.jobs.weights.tensor_files import report
from maelstream.model.classifier import build_classifier
from maelstream.model.config import ClassifierConfig, MAEConfig
from maelstream.model.formats import to_hf_file
from maelstream.model.mae import MAE
from maelstream.model.patches import normalise

TINY = MAEConfig(
    *((32, 32), 8),
    dim=32,
    depth=2,
    heads=4,
    mlp_ratio=3.0,
    decoder_dim=16,
    decoder_depth=1,
    decoder_heads=2,
)
VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
VIT_MAE = VIT | {
    "model_type": "vit_mae",
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
    "norm_pix_loss": True,
}
PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}


@pytest.fixture(autouse=True)
def forget_reports() -> None:
    report.cache_clear()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def hub_folder(path: Path, config: dict[str, Any], pixels: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if pixels is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(pixels))
    save_file(tensors, path / "model.safetensors")
    return path


def features(path: Path, images: Tensor) -> Tensor:
    """Features (B, 1+L, D) as `maelstream knn` computes them from these weights."""
    stored = read_weights(path)
    sizes, mean, std = classifier_values(stored, None, None)
    config = ClassifierConfig(**sizes, classes=1, pool="class_token", drop_path=0.0)
    model = classifier_from_encoder(stored, config).eval()
    with torch.no_grad():
        return model.forward_features(normalise(images, mean, std))


def test_features_of_a_hugging_face_folder_equal_transformers(tmp_path: Path, images: Tensor) -> None:
    """Heads, mean and std are those of the folder; without them the features' cosine is 0.8."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**{k: v for k, v in VIT.items() if k != "model_type"})
    torch.manual_seed(0)
    model = transformers.ViTModel(config, add_pooling_layer=True).eval()
    with torch.no_grad():  # fresh weights hardly depend on the input
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **PIXELS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        expected = model(pixel_values=pixels).last_hidden_state
    found = features(tmp_path, images)
    assert (found - expected).abs().max() < 1e-4 and expected.std() > 0.1
    (tmp_path / "preprocessor_config.json").unlink()
    assert torch.cosine_similarity(features(tmp_path, images).flatten(1), expected.flatten(1)).min() < 0.999


def test_a_hugging_face_configuration_gives_what_shapes_do_not_show(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", VIT_MAE, PIXELS, to_hf_file(MAE(TINY).state_dict()))
    stored = read_weights(folder)
    assert stored.known["target"] == "normalised_pixel" and stored.known["decoder_heads"] == 2
    assert encoder_values(stored) == {
        "model": {name: getattr(TINY, name) for name in encoder_values(stored)["model"]},
        "data": {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)},
    }
    assert encoder_values(stored)["model"]["heads"] == 4  # 32 / 64 would be 0


@pytest.mark.parametrize(
    ("pixels", "mean", "std"),
    [
        (PIXELS | {"do_rescale": False}, 0.5 / 255, 0.1 / 255),
        (PIXELS | {"do_rescale": True, "rescale_factor": 1 / 127.5}, 0.25, 0.05),
        (PIXELS | {"do_normalize": False}, 0.0, 1.0),
        (PIXELS | {"rescale_factor": 0.00392156862745098}, 0.5, 0.1),
        (None, 0.485, 0.229),
    ],
)
def test_any_scale_of_pixels_becomes_a_mean_and_std_of_pixels_in_0_to_1(
    tmp_path: Path, pixels: dict[str, Any] | None, mean: float, std: float, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = read_weights(hub_folder(tmp_path / "hub", VIT_MAE, pixels, to_hf_file(MAE(TINY).state_dict())))
    _, found_mean, found_std = classifier_values(stored, None, None)
    assert (found_mean[0], found_std[0]) == pytest.approx((mean, std))
    assert ("assuming ImageNet's mean and std" in capsys.readouterr().err) == (pixels is None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act gelu_new"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
        ({"qkv_bias": False}, "qkv_bias False"),
        ({"model_type": "dinov2"}, "model_type dinov2, and only vit and vit_mae"),
        ({"hidden_size": 64}, "has dim 64, its tensors have 32"),
        ({"patch_size": 16}, "has patch_size 16, its tensors have 8"),
        ({"num_hidden_layers": 3}, "has depth 3, its tensors have 2"),
        ({"image_size": [32]}, "image_size [32] is neither a number nor a pair"),
    ],
)
def test_a_configuration_of_another_kind_of_model_is_one_line(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    folder = hub_folder(tmp_path / "hub", VIT_MAE | change, PIXELS, to_hf_file(MAE(TINY).state_dict()))
    with pytest.raises(WeightsError) as caught:
        read_weights(folder)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_default_epsilon_of_transformers_is_read_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published folders have 1e-12, though their weights were trained with 1e-6."""
    for config in (VIT_MAE | {"layer_norm_eps": 1e-12}, {k: v for k, v in VIT_MAE.items() if k != "layer_norm_eps"}):
        report.cache_clear()
        read_weights(hub_folder(tmp_path / "hub", config, PIXELS, to_hf_file(MAE(TINY).state_dict())))
        assert "layer_norm_eps 1e-12 is read as 1e-06" in capsys.readouterr().err


def timm_folder(path: Path, **arguments: Any) -> timm.models.VisionTransformer:
    """A folder as `timm.models.save_for_hf` writes it, and its model."""
    path.mkdir(exist_ok=True)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, **arguments).eval()
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
    }
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32]}
    extra = {name: value for name, value in arguments.items() if name not in ("num_classes", "global_pool")}
    (path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pixels, "model_args": sizes | extra}))
    save_file(model.state_dict(), path / "model.safetensors")
    return model


def test_a_timm_folder_gives_heads_mean_and_std(tmp_path: Path, images: Tensor) -> None:
    model = timm_folder(tmp_path / "timm", num_classes=5, global_pool="avg")
    classifier, config, mean, std = stored_classifier(read_weights(tmp_path / "timm"), None)
    assert (config.heads, config.pool, mean, std) == (4, "mean", (0.5,) * 3, (0.25,) * 3)
    with torch.no_grad():
        expected = model(normalise(images, mean, std))
        assert (classifier.eval()(normalise(images, mean, std)) - expected).abs().max() < 1e-5


def test_a_timm_folder_of_another_kind_is_one_line(tmp_path: Path) -> None:
    timm_folder(tmp_path / "scaled", init_values=0.1)
    with pytest.raises(WeightsError, match=r"config\.json: init_values 0\.1: a ViT as in the MAE paper has"):
        read_weights(tmp_path / "scaled")
    timm_folder(tmp_path / "averaged", num_classes=5, global_pool="avg", fc_norm=False)
    with pytest.raises(WeightsError, match="fc_norm False"):
        read_weights(tmp_path / "averaged")


def run_folder(path: Path, step: int = 12) -> RunFolder:
    """A run with one checkpoint and its manifest, without training."""
    folder = RunFolder(path)
    writing = folder.checkpoints.folder / "x.writing"
    writing.mkdir(parents=True)
    folder.config.write_text(dump_recipe(Recipe(model=TINY)))
    save_file(dict(MAE(TINY).named_parameters()), writing / WEIGHTS)
    (writing / STATE).write_text("{}")
    folder.checkpoints.publish(writing, step, {name: digest_of(writing / name) for name in (WEIGHTS, STATE)})
    return folder


def linked_runs(tmp_path: Path) -> list[Path]:
    """Paths that lead to the weights of a run through a link to its checkpoints, itself, one checkpoint or the file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run_folder(tmp_path / "a")
    (tmp_path / "a" / "checkpoints").rename(disk / "checkpoints of a")
    (tmp_path / "a" / "checkpoints").symlink_to(Path("..") / "disk" / "checkpoints of a")
    (tmp_path / "best").symlink_to(Path("a") / "checkpoints" / "step-00000012")
    run_folder(disk / "b")
    (tmp_path / "b").symlink_to(disk / "b")
    run_folder(tmp_path / "c")
    checkpoint = tmp_path / "c" / "checkpoints" / "step-00000012"
    checkpoint.rename(disk / "one checkpoint")
    checkpoint.symlink_to(disk / "one checkpoint")
    run_folder(tmp_path / "d")
    file = tmp_path / "d" / "checkpoints" / "step-00000012" / WEIGHTS
    file.rename(disk / "weights")
    file.symlink_to(disk / "weights")
    return [tmp_path / name for name in ("a", "best", "b", "c", "d")]


def test_links_change_neither_the_configuration_nor_the_check_of_the_sha_256(tmp_path: Path) -> None:
    expected = MAE(TINY).state_dict()
    found = {path: read_weights(path) for path in linked_runs(tmp_path)}
    for path, stored in found.items():
        assert stored.known["heads"] == 4 and torch.equal(stored.tensors["pos_embed"], expected["pos_embed"]), path
    for path, stored in found.items():
        with stored.file.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\x00\x00\x80\x3f")
        for damaged in (path, stored.file, stored.file.parent):
            with pytest.raises(WeightsError, match=r"weights\.safetensors is damaged: its SHA-256"):
                read_weights(damaged)
    with pytest.raises(WeightsError, match="SHA-256"):  # without the run
        read_weights(tmp_path / "disk" / "checkpoints of a" / "step-00000012")


def test_the_checkpoint_of_a_classifier_is_checked_and_described(tmp_path: Path) -> None:
    config = ClassifierConfig(3, (32, 32), 8, dim=32, depth=2, heads=4)
    folder = run_folder(tmp_path / "run")
    folder.config.write_text(
        dump_recipe(
            ClassificationRecipe(
                model=config, data=dataclasses.replace(ClassificationRecipe().data, mean=(0.1, 0.2, 0.3))
            )
        )
    )
    checkpoint = folder.checkpoints.at(12).rename(folder.checkpoints.folder / "x.writing")
    save_file(build_classifier(config).state_dict(), checkpoint / WEIGHTS)
    folder.checkpoints.publish(checkpoint, 12, {name: digest_of(checkpoint / name) for name in (WEIGHTS, STATE)})
    folder.checkpoints.folder.rename(tmp_path / "disk")
    folder.checkpoints.folder.symlink_to(tmp_path / "disk")
    for path in (tmp_path / "run", folder.checkpoints.at(12), folder.checkpoints.at(12) / WEIGHTS):
        _, found, mean, _ = stored_classifier(read_weights(path), None)
        assert (found.heads, found.pool, mean) == (4, "mean", (0.1, 0.2, 0.3))
    file = folder.checkpoints.at(12) / WEIGHTS
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(WeightsError, match="SHA-256"):
        read_weights(file)
