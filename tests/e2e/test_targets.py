"""The targets "pca" and "token" through the commands: fit, pre-train, resume, reconstruct."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maelstream.jobs.command import run
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights import tokenizer_fitting
from maelstream.jobs.weights.target_file import read_target_file
from maelstream.shards.dataset import Dataset
from tests.helpers.forked import run_ranks

RECIPE = """
model: {image_size: [32, 32], patch_size: 8, dim: 48, depth: 2, heads: 3, decoder_dim: 32, decoder_depth: 1,
         decoder_heads: 4, components: 20, codes: 64}
optim: {batch_size: 10, base_lr: 0.05, warmup_epochs: 0.5, epochs: 2}
log: {every_steps: 1}
"""
FIT = {
    "pca": ["fit-pca", "--images", "50"],
    "token": ["fit-tokenizer", "--hidden", "16", "--batch-size", "8", "--steps", "12", "--log-every", "6"],
}
STEPS = 8


@pytest.fixture(scope="module")
def recipes(packed: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("targets")
    paths = {}
    for kind in FIT:
        paths[kind] = folder / f"{kind}.yaml"
        text = RECIPE.replace("codes: 64", f"codes: 64, target: {kind}")
        paths[kind].write_text(text + f"data: {{dataset: {packed.folder}}}\ntarget_file: {folder / kind}.safetensors\n")
    return paths


def fit(kind: str, packed: Dataset, recipe: Path, out: Path, *more: str) -> int:
    command, *options = FIT[kind]
    return run(command, [packed.folder, "--recipe", str(recipe), "--out", str(out), *options, *more])


def pretrain(recipe: Path, folder: RunFolder, last: int, *more: str) -> None:
    options = ("--run", str(folder.path), "--stop-at-step", str(last), *more)
    run_ranks(1, str(recipe), *options, output=folder.path.with_name("output"))


@pytest.fixture(scope="module", params=FIT)
def trained(request: pytest.FixtureRequest, packed: Dataset, recipes: dict[str, Path]) -> tuple[str, RunFolder]:
    """A run that stopped after 2 steps and resumed without the target file that it started with."""
    kind = request.param
    recipe = recipes[kind]
    fitted = recipe.with_suffix(".safetensors")
    assert fit(kind, packed, recipe, fitted) == 0
    folder = RunFolder(recipe.parent / f"run-{kind}")
    pretrain(recipe, folder, 2)
    fitted.unlink()
    pretrain(recipe, folder, STEPS)
    return kind, folder


def test_a_run_trains_on_the_target_and_resumes_from_its_own_copy(trained: tuple[str, RunFolder]) -> None:
    kind, folder = trained
    lines = folder.read_metrics()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    if kind == "token":
        assert lines[0]["loss"] == pytest.approx(math.log(64), rel=0.15)
    assert folder.target_file.is_file()
    weights = load_file(folder.path / "checkpoints" / f"step-{STEPS:08d}" / "weights.safetensors")
    assert len(weights["decoder_pred.bias"]) == {"pca": 20, "token": 64}[kind]
    assert not any("target" in name for name in weights)


@pytest.mark.parametrize("trained", ["token"], indirect=True)
def test_resuming_a_run_on_tokens_is_bit_identical(
    trained: tuple[str, RunFolder], recipes: dict[str, Path], tmp_path: Path
) -> None:
    kind, resumed = trained
    uninterrupted = RunFolder(tmp_path / "run")
    pretrain(recipes[kind], uninterrupted, STEPS, "--target-file", str(resumed.target_file))
    losses = ([line["loss"] for line in folder.read_metrics()] for folder in (resumed, uninterrupted))
    assert next(losses) == next(losses)
    actual, expected = resumed.checkpoints.weights(STEPS), uninterrupted.checkpoints.weights(STEPS)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)
    assert resumed.target_file.read_bytes() == uninterrupted.target_file.read_bytes()


def test_reconstruct_shows_predicted_targets_as_pixels(
    trained: tuple[str, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = trained
    assert run("reconstruct", [str(folder.path), "--count", "3"]) == 0
    (grid,) = (folder.path / "reconstructions").glob(f"step-{STEPS:08d}-*/grid.png")
    assert grid.read_bytes().startswith(b"\x89PNG")


def test_a_different_target_file_than_that_of_the_run_is_an_error(
    trained: tuple[str, RunFolder], recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, folder = trained
    other = read_target_file(folder.target_file)
    name = {"pca": "mean", "token": "blocks.input.b"}[kind]
    other.tensors[name][0] += 1
    other.write(tmp_path / "other.safetensors")
    options = [str(recipes[kind]), "--run", str(folder.path), "--target-file", str(tmp_path / "other.safetensors")]
    assert run("pretrain", options) == 2
    printed = capsys.readouterr().err
    assert f"another target_file than {tmp_path / 'other.safetensors'}" in printed and printed.count("\n") == 1


def test_reconstruct_needs_the_decoder_of_the_tokenizer(
    recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: Dataset
) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    folder.config.write_text(recipes["token"].read_text())
    assert fit("token", packed, recipes["token"], tmp_path / "tokenizer.safetensors") == 0
    file = read_target_file(tmp_path / "tokenizer.safetensors")
    for name in [name for name in file.tensors if name.startswith("decoder.")]:
        del file.tensors[name]
    file.write(folder.target_file)
    capsys.readouterr()
    assert run("reconstruct", [str(folder.path)]) == 2
    printed = capsys.readouterr().err
    assert "has no decoder, so the run's tokens cannot be shown as pixels" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("kind", FIT)
def test_fitting_writes_the_same_file_for_any_number_of_threads(
    kind: str, packed: Dataset, recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for threads in ("1", "2"):
        assert fit(kind, packed, recipes[kind], tmp_path / f"{threads}.safetensors", "--threads", threads) == 0
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    printed = capsys.readouterr().out
    assert ("explained variance" if kind == "pca" else "of 64 codes used, perplexity") in printed
    settings = read_target_file(tmp_path / "1.safetensors").settings
    assert settings["dataset"] == packed.fingerprint and settings["images"] == {"pca": 50, "token": 96}[kind]


def test_collapsed_codes_end_the_fit_without_writing_a_file(
    packed: Dataset,
    recipes: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one_code_wins(model: torch.nn.Module, seed: int) -> None:
        initialise(model, seed)
        if isinstance(model, tokenizer_fitting.Encoder):
            with torch.no_grad():
                model.get_parameter("blocks.output.conv.b")[3] = 50.0

    initialise = tokenizer_fitting.initialise
    monkeypatch.setattr(tokenizer_fitting, "initialise", one_code_wins)
    assert fit("token", packed, recipes["token"], tmp_path / "out.safetensors") == 2
    printed = capsys.readouterr().err
    assert "the codes collapsed: at step 6 the perplexity of 64 codes is 1.0" in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "options", "complaint"),
    [
        ("pca", ["--components", "193"], "components 193 is not in 1..192"),
        ("pca", ["--images", "1", "--components", "16"], "16 patches are too few for 16 components"),
        ("pca", ["--out", "pca.bin"], "the file name must end in .safetensors"),
        ("token", ["--hidden", "6"], "hidden 6 is not a multiple of 4"),
        ("token", ["--batch-size", "61"], "batch_size 61 is larger than the dataset"),
        ("token", ["--steps", "0"], "must be at least 1"),
    ],
)
def test_invalid_options_are_an_error_of_one_line(
    packed: Dataset,
    recipes: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    options: list[str],
    complaint: str,
) -> None:
    assert fit(kind, packed, recipes[kind], tmp_path / "out.safetensors", *options) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_model_without_three_channels_is_an_error(
    packed: Dataset, recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = tmp_path / "grey.yaml"
    grey.write_text(f"base: {recipes['pca']}\nmodel: {{in_chans: 1, mean: [0.5], std: [0.2]}}\n")
    assert fit("pca", packed, grey, tmp_path / "out.safetensors") == 2
    assert "model.in_chans 1: images are decoded to 3 channels" in capsys.readouterr().err


def test_perplexity_counts_equally_used_codes() -> None:
    assert tokenizer_fitting.perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert tokenizer_fitting.collapsed(16, 8192) and not tokenizer_fitting.collapsed(17, 8192)
    assert tokenizer_fitting.collapsed(1.9, 64) and not tokenizer_fitting.collapsed(2.1, 64)


def test_temperature_falls_and_the_divergence_weight_rises() -> None:
    assert tokenizer_fitting.anneal(0, 100) == (1.0, 0.0)
    cold, weight = tokenizer_fitting.anneal(75, 100)
    assert (cold, weight) == (pytest.approx(1 / 16), pytest.approx(6.6))
    temperatures, weights = zip(*(tokenizer_fitting.anneal(step, 100) for step in range(100)), strict=True)
    assert list(temperatures) == sorted(temperatures, reverse=True) and list(weights) == sorted(weights)
