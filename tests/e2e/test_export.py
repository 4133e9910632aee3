"""`maelstream export`: each library loads the result offline with the code of the model card."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # timm and transformers read it when they are imported

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTImageProcessor, ViTMAEForPreTraining, ViTMAEModel

from maelstream.jobs.command import run
from maelstream.jobs.recipe import DataConfig, Recipe, StreamConfig, dump_recipe
from maelstream.jobs.reporting.model_card import without_paths
from maelstream.jobs.weights.reading import mae_weights, read_weights
from maelstream.model.config import MAEConfig
from maelstream.model.formats import without_decoder
from maelstream.model.mae import MAE
from maelstream.model.masking import mask_by_score
from maelstream.model.patches import normalise
from maelstream.shards.dataset import Dataset

TINY = MAEConfig(
    (32, 32),
    patch_size=8,
    dim=32,
    depth=2,
    heads=2,
    mlp_ratio=3.0,
    decoder_dim=16,
    decoder_depth=1,
    decoder_heads=2,
    mask_ratio=0.6,
    target="pixel",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
)


def run_folder(path: Path, config: MAEConfig, steps: tuple[int, ...] = (12,)) -> Path:
    """The files of a run of `maelstream pretrain`, without training; a checkpoint holds only parameters."""
    recipe = Recipe(model=config, data=DataConfig(dataset="/disk/home/photographs"))
    for step in steps:
        checkpoint = path / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        save_file(dict(MAE(config, seed=step).named_parameters()), checkpoint / "weights.safetensors")
    (path / "config.yaml").write_text(dump_recipe(recipe))
    lines = [{"step": step, "loss": 1 / step} for step in range(2, 21, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("tiny") / "run", TINY, steps=(8, 12))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("base") / "run", MAEConfig())


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def code_of_the_card(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def variables_of_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Runs the card's code in the export's folder and returns its variables."""
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code_of_the_card(folder), names)
    return names


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_reference_format_is_exact_and_complete(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run("export", [str(tiny), "--format", "reference", "--out", str(out)]) == 0
    expected = MAE(TINY, seed=12).state_dict()
    assert_same(variables_of_the_card(out, monkeypatch)["weights"], expected)
    assert_same(load_file(out / "weights.safetensors"), expected)
    for path in (out, out / "weights.pth"):
        assert_same(mae_weights(read_weights(path), TINY), expected)


def test_an_encoder_alone_has_the_form_that_the_authors_publish_for_fine_tuning(tiny: Path, tmp_path: Path) -> None:
    options = ["--format", "reference", "--encoder-only", "--step", "8", "--out", str(tmp_path / "out")]
    assert run("export", [str(tiny), *options]) == 0
    found = torch.load(tmp_path / "out" / "weights.pth", weights_only=True)
    assert_same(found["model"], without_decoder(MAE(TINY, seed=8).state_dict()))


def test_timm_loads_a_model_of_any_size_strictly(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    out = tmp_path / "out"
    assert run("export", [str(tiny), "--format", "timm", "--out", str(out)]) == 0
    model = MAE(TINY, seed=12)
    loaded = variables_of_the_card(out, monkeypatch)["model"].eval()
    assert_same(loaded.state_dict(), without_decoder(model.state_dict()))
    pixels = normalise(images, TINY.mean, TINY.std)
    with torch.no_grad():
        assert (loaded.forward_features(pixels) - model.encode(images)).abs().max() < 1e-5
        assert (loaded.double().forward_features(pixels.double()) - model.double().encode(images)).abs().max() < 1e-12
    data = timm.data.resolve_model_data_config(loaded)
    assert (tuple(data["mean"]), tuple(data["std"]), data["input_size"]) == (TINY.mean, TINY.std, (3, 32, 32))
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)(pixels).shape == (2, 7)
    assert_same(read_weights(out).tensors, without_decoder(model.state_dict()))


def test_timm_does_not_load_weights_that_lack_a_tensor(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("export", [str(tiny), "--format", "timm", "--out", str(out)]) == 0
    weights = load_file(out / "model.safetensors")
    del weights["norm.bias"]
    save_file(weights, out / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.bias"):
        timm.create_model(f"local-dir:{out}", pretrained=True)


def test_vit_base_loads_as_the_mae_model_of_timm(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert run("export", [str(base), "--format", "timm", "--out", str(out)]) == 0
    assert 'timm.create_model(\n    "vit_base_patch16_224.mae", pretrained=True' in code_of_the_card(out)
    model = variables_of_the_card(out, monkeypatch)["model"]
    assert_same(model.state_dict(), load_file(out / "model.safetensors"))
    assert model.pretrained_cfg["tag"] == "mae" and model.norm.eps == 1e-6


def test_the_hugging_face_model_has_the_same_loss_on_the_same_mask(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    out = tmp_path / "out"
    assert run("export", [str(tiny), "--format", "hf", "--out", str(out)]) == 0
    loaded, loading = ViTMAEForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.layer_norm_eps == 1e-6 and loaded.vit.layernorm.eps == 1e-6
    assert loaded.config.mask_ratio == 0.6 and not loaded.config.norm_pix_loss
    model = MAE(TINY, seed=12).double()
    noise = torch.from_numpy(np.random.RandomState(0).random_sample((2, 16)))
    pixels = normalise(images, TINY.mean, TINY.std).double()
    with torch.no_grad():
        loss = model.loss(pixels, mask_by_score(noise, TINY.keep)).item()
        assert loaded.double()(pixels, noise=noise).loss.item() == pytest.approx(loss, rel=1e-12)
    processor = variables_of_the_card(out, monkeypatch)["processor"]
    processed = processor(list(images), do_resize=False, return_tensors="pt")["pixel_values"]  # of the model's size
    assert (processed - pixels).abs().max() < 1e-5
    assert_same(mae_weights(read_weights(out), TINY), MAE(TINY, seed=12).state_dict())


def test_the_hugging_face_encoder_has_the_same_features(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    """It needs the mask ratio of 0 and the ascending noise of the card; otherwise it masks and shuffles patches."""
    out = tmp_path / "out"
    assert run("export", [str(tiny), "--format", "hf", "--encoder-only", "--out", str(out)]) == 0
    _, loading = ViTMAEModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    names = variables_of_the_card(out, monkeypatch) | {"pixels": normalise(images, TINY.mean, TINY.std), "torch": torch}
    comment = "\n".join(line.partition("# ")[2] for line in code_of_the_card(out).splitlines() if "# " in line)
    with torch.no_grad():
        exec(comment.partition(": ")[2], names)
        assert (names["features"] - MAE(TINY, seed=12).encode(images)).abs().max() < 1e-5


def test_an_export_reconstructs_as_the_run_does_unless_it_lacks_the_decoder(
    tiny: Path, packed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(tiny), "--dataset", packed.folder, "--count", "2", "--out", str(tmp_path / "x.png")]
    assert run("reconstruct", options) == 0
    expected = capsys.readouterr().out.partition("loss on removed patches ")[2]
    for name, more in {"hf": [], "reference": [], "alone": ["--encoder-only"]}.items():
        format = "hf" if name == "alone" else name
        assert run("export", [str(tiny), "--format", format, "--out", str(tmp_path / name), *more]) == 0
    for weights in (tmp_path / "hf", tmp_path / "reference" / "weights.pth"):
        capsys.readouterr()
        assert run("reconstruct", [*options, "--weights", str(weights)]) == 0
        assert capsys.readouterr().out.partition("loss on removed patches ")[2] == expected
    assert run("reconstruct", [*options, "--weights", str(tmp_path / "alone")]) == 2
    assert (
        "model.safetensors holds an encoder alone (ViT/8 (32 x 2), 32 x 32 px, no decoder)" in capsys.readouterr().err
    )


def test_export_to_hugging_face_does_not_need_transformers(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; from maelstream.jobs.command import run; "
        "sys.exit(run('export', {}))"
    )
    args = [str(tiny), "--format", "hf", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code.format(args)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr


def test_the_card_has_the_step_the_loss_and_the_recipe_but_no_local_path(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("export", [str(tiny), "--format", "hf", "--step", "8", "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "# ViT/8 (32 x 2), 32 x 32 px, decoder 16 x 1" in card
    assert "step 8, loss 0.1250 on removed patches at step 8 (target pixel, 60% removed), on photographs." in card
    assert "base_lr: 0.00015" in card and "engine" not in card and "/disk" not in card and str(tiny) not in card
    listed = set(re.findall(r"^\| `(.*?)`", card, re.MULTILINE))
    assert listed | {"README.md", "export.json"} == {path.name for path in out.iterdir()}


def test_an_export_is_written_into_the_run_by_default_and_can_be_repeated(tiny: Path) -> None:
    for _ in range(2):
        assert run("export", [str(tiny), "--format", "timm"]) == 0
    assert [path.name for path in (tiny / "export").iterdir()] == ["timm-step-00000012"]


def test_a_folder_with_other_files_is_left_unchanged(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.tex", tiny):
        assert run("export", [str(tiny), "--format", "timm", "--out", str(out)]) == 2
        assert f"--out {out} holds files that are not an export" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_export_leaves_the_older_one_unchanged(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(tiny), "--format", "timm", "--out", str(tmp_path / "out")]
    assert run("export", options) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maelstream.jobs.reporting.exporting.model_card", full)
    assert run("export", [*options, "--step", "8"]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_runs_and_weights_that_cannot_be_exported_are_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", [str(tmp_path), "--format", "hf"]) == 2
    assert "is not a run" in capsys.readouterr().err
    wide = run_folder(tmp_path / "wide", dataclasses.replace(TINY, image_size=(16, 32)), steps=(4, 8))
    assert run("export", [str(wide), "--format", "hf"]) == 2
    assert "takes square images, not (16, 32); export to timm instead" in capsys.readouterr().err
    assert run("export", [str(wide), "--format", "timm", "--step", "6"]) == 2
    assert "has no checkpoint of step 6; give one of its steps: 4, 8" in capsys.readouterr().err
    assert run("export", [str(wide), "--format", "timm"]) == 0
    model = timm.create_model(f"local-dir:{wide / 'export' / 'timm-step-00000008'}", pretrained=True)
    assert model.patch_embed.grid_size == (2, 4)
    assert read_weights(wide / "export" / "timm-step-00000008").grid == (2, 4)
    file = wide / "checkpoints" / "step-00000008" / "weights.safetensors"
    weights = load_file(file)
    weights["norm.bias"][3] = torch.nan
    save_file(weights, file)
    assert run("export", [str(wide), "--format", "reference"]) == 2
    assert (
        "weights.safetensors: NaN or infinity in norm.bias; use weights of an earlier step" in capsys.readouterr().err
    )
    file.write_bytes(file.read_bytes()[:5000])
    assert run("export", [str(wide), "--format", "reference"]) == 2
    assert "weights.safetensors is truncated or is not a file of weights" in capsys.readouterr().err


def test_datasets_of_the_same_name_stay_distinct_in_the_card() -> None:
    mix = DataConfig(mix={"/a/train": 3.0, "s3://b/train/": 1.0, "/c/val": 2.0})
    assert without_paths(mix).mix == {"train": 3.0, "train (2)": 1.0, "val": 2.0}
    stream = DataConfig(stream=StreamConfig("pipe:ssh host cat /data/home/train-{00..63}.tar", 60))
    assert without_paths(stream).stream == StreamConfig("train-{00..63}.tar", 60)


def test_the_image_processor_prepares_images_for_the_model(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("export", [str(tiny), "--format", "hf", "--out", str(out)]) == 0
    processor = ViTImageProcessor.from_pretrained(out)
    assert tuple(processor.image_mean) == TINY.mean and tuple(processor.image_std) == TINY.std
    image = np.zeros((50, 70, 3), np.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
