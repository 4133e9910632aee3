"""`maelstream export` of fine-tuned runs: our classifier, timm's and transformers' give the same logits."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # timm and transformers read it when they are imported

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from maelstream.jobs.command import run
from maelstream.jobs.evaluation.results import RESULT, Evaluation
from maelstream.jobs.recipe import ClassificationRecipe, LabelledData, TuningConfig, dump_recipe
from maelstream.jobs.weights.export_classifier import fold_probe
from maelstream.jobs.weights.reading import read_weights, stored_classifier
from maelstream.model.classifier import build_classifier, make_linear_probe
from maelstream.model.config import ClassifierConfig
from maelstream.model.patches import normalise
from maelstream.shards.dataset import Dataset

CONFIG = ClassifierConfig(3, (32, 32), 8, dim=32, depth=2, heads=4, mlp_ratio=3.0, drop_path=0.1)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
TOLERANCE = 2e-5  # float32; logits are of size 1


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def clear(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with weights that make its logits depend on the input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def finetuned(path: Path, train: str, config: ClassifierConfig = CONFIG, **recipe: Any) -> torch.nn.Module:
    """The files of a run of finetune without training it; returns its classifier."""
    model = clear(build_classifier(config, seed=1), 1)
    checkpoint = path / "checkpoints" / "step-00000012"
    checkpoint.mkdir(parents=True)
    data = LabelledData(train=train, val="/disk/home/val", mean=MEAN, std=STD)
    described = ClassificationRecipe(model=config, data=data, weights="/disk/home/mae_pretrain.pth", **recipe)
    (path / "config.yaml").write_text(dump_recipe(described))
    lines = [{"step": 6, "loss": 1.0, "top1": 40.0, "top5": 90.0}, {"step": 12, "loss": 0.5}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file(model.state_dict(), checkpoint / "weights.safetensors")
    return model


def exported(folder: Path, format: str, *options: str) -> Path:
    assert run("export", [str(folder), "--format", format, "--out", str(folder / format), *options]) == 0
    return folder / format


def logits(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found = model.eval()(normalise(images, MEAN, STD))
    return getattr(found, "logits", found)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < TOLERANCE and expected.std() > 0.1


def variables_of_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_timm_has_the_logits_and_the_class_names(
    tmp_path: Path, packed: Dataset, pool: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = finetuned(tmp_path, packed.folder, dataclasses.replace(CONFIG, pool=pool))
    out = exported(tmp_path, "timm")
    loaded = variables_of_the_card(out, monkeypatch)["model"]
    assert_same(logits(loaded, images), logits(model, images))
    assert loaded.pretrained_cfg["label_names"] == ["class00", "class01", "class02"]
    data = timm.data.resolve_model_data_config(loaded)
    assert (tuple(data["mean"]), tuple(data["std"]), data["input_size"]) == (MEAN, STD, (3, 32, 32))
    assert data["crop_pct"] == pytest.approx(224 / 256, abs=1e-3)


def test_transformers_has_the_logits_and_the_class_names(
    tmp_path: Path, packed: Dataset, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    model = finetuned(tmp_path, packed.folder, dataclasses.replace(CONFIG, pool="class_token"))
    names = variables_of_the_card(exported(tmp_path, "hf"), monkeypatch)
    assert_same(logits(names["model"], images), logits(model, images))
    assert names["model"].config.id2label == {0: "class00", 1: "class01", 2: "class02"}
    _, loading = type(names["model"]).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert tuple(names["processor"].image_mean) == MEAN and tuple(names["processor"].image_std) == STD


@pytest.mark.parametrize("format", ["reference", "timm", "hf"])
@pytest.mark.parametrize("keep_note", [True, False])
def test_an_export_is_read_as_the_classifier_that_it_is(
    tmp_path: Path, packed: Dataset, images: Tensor, format: str, keep_note: bool
) -> None:
    """Also without export.json, as a folder that others publish; the reference's format then lacks heads and pixels."""
    model = finetuned(tmp_path, packed.folder, dataclasses.replace(CONFIG, pool="class_token"))
    out = exported(tmp_path, format)
    if not keep_note:
        (out / "export.json").unlink()
    heads = 4 if format == "reference" and not keep_note else None
    classifier, config, mean, std = stored_classifier(read_weights(out), heads)
    assert (config.heads, config.pool, config.mlp_ratio) == (4, "class_token", 3.0)
    assert ((mean, std) == (MEAN, STD)) == (heads is None)
    assert_same(logits(classifier, images), logits(model, images))


def test_the_card_says_what_the_classifier_is_and_shows_no_local_path(tmp_path: Path, packed: Dataset) -> None:
    finetuned(tmp_path, packed.folder)
    card = (exported(tmp_path, "timm") / "README.md").read_text()
    assert "# ViT/8 (32 x 2), 32 x 32 px, 3 classes" in card and "- image-classification" in card
    assert "A ViT that classifies the mean of the patch tokens into 3 classes, trained by `maelstream finetune`" in card
    assert "from the encoder mae_pretrain.pth: step 12, top-1 40.00 % and top-5 90.00 % on val at step 6." in card
    assert "/disk" not in card and str(tmp_path) not in card and "masked" not in card.partition("## Licence")[0]


@pytest.mark.parametrize("probes", [1, 3])
def test_a_linear_probe_becomes_one_linear_layer(
    tmp_path: Path, packed: Dataset, images: Tensor, probes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its BatchNorm is folded into the layer; of several probes the best one of the result is exported."""
    config = dataclasses.replace(CONFIG, pool="class_token", drop_path=0.0)
    lrs = (0.1, 0.2, 0.3)[:probes]
    finetuned(tmp_path, packed.folder, config, job="linprobe", tuning=TuningConfig(probe=True, lrs=lrs))
    model = build_classifier(config, seed=1)
    make_linear_probe(model, heads=probes)
    clear(model, 2)
    model.head[0].running_mean.normal_()
    model.head[0].running_var.uniform_(0.5, 2)
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    save_file(weights, tmp_path / "checkpoints" / "step-00000012" / "weights.safetensors")
    if probes > 1:
        assert run("export", [str(tmp_path), "--format", "timm"]) == 2
        assert "trains 3 linear probes and has no result yet" in capsys.readouterr().err
        result = Evaluation("linprobe", "x", 1.0, 1.0, 1, 1.0, None, "", "", "", "", {"best": "lr 0.2"}, 0.0)
        (tmp_path / RESULT).write_text(json.dumps(dataclasses.asdict(result)))
    loaded = timm.create_model(f"local-dir:{exported(tmp_path, 'timm')}", pretrained=True)
    expected = logits(model, images)
    assert_same(logits(loaded, images), expected[1] if probes > 1 else expected)
    head = fold_probe(weights, 1 if probes > 1 else None)
    assert head["head.weight"].shape == (3, 32) and "BatchNorm is folded" in (tmp_path / "timm/README.md").read_text()


def test_the_moving_average_is_exported_on_request(
    tmp_path: Path, packed: Dataset, images: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    finetuned(tmp_path, packed.folder)
    assert run("export", [str(tmp_path), "--format", "timm", "--ema"]) == 2
    assert "keeps no moving average of its weights; leave out --ema" in capsys.readouterr().err
    average = clear(build_classifier(CONFIG, seed=1), 9)
    save_file(average.state_dict(), tmp_path / "checkpoints" / "step-00000012" / "ema.safetensors")
    loaded = timm.create_model(f"local-dir:{exported(tmp_path, 'timm', '--ema')}", pretrained=True)
    assert_same(logits(loaded, images), logits(average, images))


def test_what_cannot_be_exported_is_one_line(
    tmp_path: Path, packed: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    finetuned(tmp_path, packed.folder)
    for options, expected in (
        (["--format", "hf"], "classifies the class token, and this run averages the patch tokens (model.pool mean)"),
        (["--format", "timm", "--encoder-only"], "is a run of finetune, which has no decoder to leave out"),
    ):
        assert run("export", [str(tmp_path), *options]) == 2
        assert expected in capsys.readouterr().err
    file = tmp_path / "checkpoints" / "step-00000012" / "weights.safetensors"
    save_file({name: t for name, t in read_weights(file).tensors.items() if name != "fc_norm.bias"}, file)
    assert run("export", [str(tmp_path), "--format", "timm"]) == 2
    assert "looks like ViT/8 (32 x 2), 32 x 32 px, no decoder, and the model is" in capsys.readouterr().err


def test_without_the_dataset_classes_have_numbers_and_a_note_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetuned(tmp_path, str(tmp_path / "gone"))
    settings = json.loads((exported(tmp_path, "timm") / "config.json").read_text())
    assert settings["label_names"] == ["0", "1", "2"]
    assert "the export has numbers instead of class names" in capsys.readouterr().err
