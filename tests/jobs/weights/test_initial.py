"""`maelstream pretrain RECIPE --init WEIGHTS`: what fits, what is recorded, and what a resumed run accepts."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from maelstream.jobs.checkpointing.digest import digest_of
from maelstream.jobs.recipe import Recipe, dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.initial import InitialWeights, initial_weights, sha256_of
from maelstream.model.config import MAEConfig
from maelstream.model.formats import to_hf_file, without_decoder
from maelstream.model.mae import MAE
from maelstream.shards.errors import MaelstreamError

TINY = MAEConfig((32, 32), patch_size=8, dim=48, depth=2, heads=3, decoder_dim=32, decoder_depth=1, decoder_heads=4)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return MAE(TINY, seed=7).state_dict()


def parameters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.endswith("pos_embed")}


def started(path: Path, recipe: Recipe) -> RunFolder:
    """A run that has recorded its recipe and its initial weights, and has no checkpoint."""
    folder = RunFolder(path)
    recipe, initial = initial_weights(recipe, folder)
    if initial is not None:
        initial.write(folder.initial_weights)
    folder.start(recipe, 0)
    return folder


def test_an_encoder_with_or_without_a_decoder_is_copied_and_recorded(
    tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "w.safetensors"
    for tensors in (weights, without_decoder(weights)):
        save_file(tensors, file)
        recipe, initial = initial_weights(Recipe(model=TINY, init=str(file)), RunFolder(tmp_path / "new"))
        assert recipe.init_sha256 == digest_of(file).sha256 == sha256_of(file) and initial is not None
        assert initial.tensors.keys() == parameters(tensors).keys()
        assert all(torch.equal(initial.tensors[name], tensors[name]) for name in initial.tensors)
    assert "the run starts from this encoder; the decoder has random weights" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_starts_from_its_own_copy(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    file = tmp_path / "w.safetensors"
    save_file(weights, file)
    folder = started(tmp_path / "run", Recipe(model=TINY, init=str(file)))
    file.unlink()
    for given in ("", str(file)):
        recipe, initial = initial_weights(Recipe(model=TINY, init=given), folder)
        assert (recipe.init, initial.tensors.keys()) == (str(file), parameters(weights).keys())  # type: ignore
        assert recipe == folder.recipe()
    folder.initial_weights.unlink()
    with pytest.raises(MaelstreamError, match=r"init\.safetensors is missing, and the run has no checkpoint"):
        initial_weights(Recipe(model=TINY), folder)
    folder.checkpoints.at(4).mkdir(parents=True)
    assert initial_weights(Recipe(model=TINY), folder)[1] is None


def test_a_run_accepts_the_same_weights_under_another_name_and_no_others(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    file, other = tmp_path / "w.safetensors", tmp_path / "other.safetensors"
    save_file(weights, file)
    folder = started(tmp_path / "run", Recipe(model=TINY, init=str(file)))
    other.write_bytes(file.read_bytes())
    assert initial_weights(Recipe(model=TINY, init=str(other)), folder)[0].init == str(file)
    save_file(MAE(TINY, seed=8).state_dict(), other)
    with pytest.raises(MaelstreamError, match=r"started from .*w\.safetensors \(SHA-256 .*not from --init .*other"):
        initial_weights(Recipe(model=TINY, init=str(other)), folder)
    file.write_bytes(other.read_bytes())
    with pytest.raises(MaelstreamError, match=r"leave out --init to resume it"):
        initial_weights(Recipe(model=TINY, init=str(file)), folder)
    plain = started(tmp_path / "plain", Recipe(model=TINY))
    with pytest.raises(MaelstreamError, match=r"started from random weights, not from --init .*w\.safetensors; leave"):
        initial_weights(Recipe(model=TINY, init=str(file)), plain)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dim": 96}, r"looks like ViT/8 \(48 x 2\).*and the model is ViT/8 \(96 x 2\)"),
        ({"depth": 3}, "blocks.2.norm1.weight is missing"),
        ({"patch_size": 4}, r"patch_embed.proj.weight is \(48, 3, 8, 8\) where the model has \(48, 3, 4, 4\)"),
        ({"decoder_depth": 2}, "decoder_blocks.1.norm1.weight is missing"),
        ({"target": "pca", "components": 9}, r"decoder_pred.weight is \(192, 32\) where the model has \(9, 32\)"),
        ({"heads": 6}, "was trained with heads 3, and model.heads is 6; make them equal"),
        ({"mean": (0.5, 0.5, 0.5)}, r"was trained with mean \(0.485, 0.456, 0.406\), and model.mean is"),
    ],
)
def test_weights_of_another_model_are_one_line(tmp_path: Path, change: dict, expected: str) -> None:
    source = tmp_path / "source"
    checkpoint = source / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (source / "config.yaml").write_text(dump_recipe(Recipe(model=TINY)))
    save_file(dict(MAE(TINY).named_parameters()), checkpoint / "weights.safetensors")
    recipe = Recipe(model=dataclasses.replace(TINY, **change), init=str(source))
    with pytest.raises(MaelstreamError, match=expected) as caught:
        initial_weights(recipe, RunFolder(tmp_path / "new"))
    assert "\n" not in str(caught.value)


def test_another_grid_is_accepted_because_its_tables_are_computed(
    tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(weights, tmp_path / "w.safetensors")
    larger = dataclasses.replace(TINY, image_size=(48, 64))
    _, initial = initial_weights(Recipe(model=larger, init=str(tmp_path / "w.safetensors")), RunFolder(tmp_path / "n"))
    model = MAE(larger)
    model.load_state_dict(initial.tensors, strict=False)  # type: ignore[union-attr]
    assert torch.equal(model.pos_embed, MAE(larger, seed=1).pos_embed)
    assert "the position tables of (6, 8) are computed" in capsys.readouterr().err


def test_a_trained_position_table_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Supervised ViTs train it, and some transformers releases leave it 0; pre-training has a fixed one."""
    for table in (torch.zeros(1, 17, 48), weights["pos_embed"] + 0.05 * torch.randn(1, 17, 48)):
        save_file(weights | {"pos_embed": table}, tmp_path / "w.safetensors")
        with pytest.raises(MaelstreamError, match=r"pos_embed is not the sine-cosine table of 4 x 4 patches"):
            initial_weights(Recipe(model=TINY, init=str(tmp_path / "w.safetensors")), RunFolder(tmp_path / "new"))


def test_a_table_in_half_precision_and_names_of_hugging_face_are_accepted(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in to_hf_file(weights).items()}
    save_file(halves, tmp_path / "w.safetensors")
    recipe = Recipe(model=TINY, init=str(tmp_path / "w.safetensors"))
    _, initial = initial_weights(recipe, RunFolder(tmp_path / "new"))
    assert isinstance(initial, InitialWeights)
    assert torch.equal(initial.tensors["blocks.0.attn.qkv.bias"], weights["blocks.0.attn.qkv.bias"])
    assert {tensor.dtype for tensor in initial.tensors.values()} == {torch.float32}
