"""`maelstream evaluate` and `knn`: correct results on any number of ranks, and one-line errors for bad input."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from maelstream.jobs.command import run
from maelstream.jobs.evaluation.results import Evaluation, read_evaluations
from maelstream.jobs.pack import main as pack
from maelstream.jobs.recipe import Recipe, dump_recipe
from maelstream.model.classifier import build_classifier
from maelstream.model.config import ClassifierConfig, MAEConfig
from maelstream.model.mae import MAE
from maelstream.model.patches import normalise
from maelstream.shards.dataset import Dataset
from tests.conftest import write_images
from tests.helpers.crops import central_images
from tests.helpers.forked import run_ranks

MODEL = MAEConfig((32, 32), patch_size=8, dim=48, depth=2, heads=3, decoder_dim=16, decoder_depth=1, decoder_heads=2)
CLASSIFIER = ClassifierConfig(classes=7, image_size=(32, 32), patch_size=8, dim=48, depth=2, heads=3, drop_path=0.0)


def packed_images(folder: Path, classes: int, per_class: int, seed: int) -> Dataset:
    write_images(folder / "images", classes=classes, per_class=per_class, seed=seed)
    assert pack([str(folder / "images"), str(folder / "shards"), "--workers", "1"]) == 0
    return Dataset.open(folder / "shards")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return packed_images(tmp_path_factory.mktemp("train"), 7, 9, seed=1)


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """35 images, which no number of ranks here divides evenly; one of them is damaged."""
    dataset = packed_images(tmp_path_factory.mktemp("val"), 7, 5, seed=2)
    with Path(dataset.folder, dataset.shard_names[dataset.shard[4]]).open("r+b") as file:
        file.seek(int(dataset.offset[4]))
        file.write(bytes(int(dataset.size[4])))
    return dataset


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the names of a fine-tuned model; large head weights make its predictions clear."""
    model = build_classifier(CLASSIFIER, seed=3)
    model.head.weight.data *= 1e5
    file = tmp_path_factory.mktemp("classifier") / "tuned.pth"
    torch.save({"model": model.state_dict()}, file)
    return file


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run with one checkpoint."""
    folder = tmp_path_factory.mktemp("pretrained")
    (checkpoint := folder / "checkpoints" / "step-00000012").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_recipe(Recipe(model=MODEL)))
    save_file(MAE(MODEL, seed=4).state_dict(), checkpoint / "weights.safetensors")
    return folder


def on_ranks(ranks: int, folder: Path, command: str, *args: str) -> Evaluation:
    run_ranks(ranks, *args, "--folder", str(folder / "result"), output=folder / "output", command=command)
    return read_evaluations(folder / "result")[0]


def sound_images(dataset: Dataset) -> tuple[torch.Tensor, np.ndarray]:
    """Normalised images of all samples except the damaged one, and their sample numbers."""
    samples = np.delete(np.arange(len(dataset)), 4)
    return normalise(central_images(dataset, samples, (32, 32)), MODEL.mean, MODEL.std), samples


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, "64"), (2, "4"), (3, "5")])
def test_top_1_and_top_5_count_every_image_once_for_any_ranks(
    classifier: Path, val: Dataset, tmp_path: Path, ranks: int, micro_batch_size: str
) -> None:
    options = ("--margin", "1", "--heads", "3", "--micro-batch-size", micro_batch_size)
    found = on_ranks(ranks, tmp_path, "evaluate", str(classifier), val.folder, *options)
    model = build_classifier(CLASSIFIER).eval()
    model.load_state_dict(torch.load(classifier)["model"])
    images, samples = sound_images(val)
    with torch.no_grad():
        order = model(images).argsort(dim=1, descending=True, stable=True)
    correct = order == torch.from_numpy(val.label[samples])[:, None]
    assert (found.top1, found.top5) == (100 * correct[:, 0].sum().item() / 35, 100 * correct[:, :5].sum().item() / 35)
    assert found.images == 35 and 0 < found.top1 < found.top5
    path, key = val.path_and_key(4)
    assert [path in text and key in text for text in found.settings["undecodable"]] == [True]
    assert (tmp_path / "output").read_text().count("counted as wrong") == 1


@pytest.mark.parametrize(("ranks", "micro_batch_size", "pool"), [(1, "64", "class_token"), (2, "4", "mean")])
def test_knn_agrees_with_scikit_learn_on_the_features_of_the_encoder(
    pretrained: Path, train: Dataset, val: Dataset, tmp_path: Path, ranks: int, micro_batch_size: str, pool: str
) -> None:
    options = ("--k", "5", "--margin", "1", "--pool", pool, "--micro-batch-size", micro_batch_size)
    found = on_ranks(ranks, tmp_path, "knn", str(pretrained), train.folder, val.folder, *options)
    mae = MAE(MODEL, seed=4)

    def features(images: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            tokens = mae.encode(images)
        return F.normalize(tokens[:, 0] if pool == "class_token" else tokens[:, 1:].mean(1), dim=1).numpy()

    samples = np.delete(np.arange(len(val)), 4)
    expected = KNeighborsClassifier(
        5, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(features(central_images(train, np.arange(len(train)), (32, 32))), train.label)
    predicted = expected.predict(features(central_images(val, samples, (32, 32))))
    assert found.top1 == 100 * (predicted == val.label[samples]).sum() / 35
    assert (found.step, found.images, found.job) == (12, 35, "knn")
    assert found in read_evaluations(pretrained)


def test_knn_is_the_same_on_any_number_of_ranks(pretrained: Path, train: Dataset, val: Dataset, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 3):
        (folder := tmp_path / f"{ranks}").mkdir()
        options = ("--k", "9", "--micro-batch-size", "5")
        found.append(on_ranks(ranks, folder, "knn", str(pretrained), train.folder, val.folder, *options))
    assert (found[0].top1, found[0].top5) == (found[1].top1, found[1].top5)
    assert 0 < found[0].top1 < found[0].top5 < 100


ErrorLine = Callable[..., str]


@pytest.fixture
def error_line(capfd: pytest.CaptureFixture[str]) -> ErrorLine:
    """Runs a command that must fail and returns its one-line error."""

    def run_failing(command: str, *args: object) -> str:
        assert run(command, [str(arg) for arg in args]) == 2
        text = capfd.readouterr().err
        assert text.count("\n") == 1, text
        return text

    return run_failing


def test_another_number_of_classes_is_a_one_line_error(
    classifier: Path, packed: Dataset, error_line: ErrorLine
) -> None:
    error = error_line("evaluate", classifier, packed.folder, "--heads", 3)
    assert "distinguishes 7 classes" in error and "has 3; give images of the classes" in error


def test_an_encoder_without_a_classifier_is_an_error(pretrained: Path, val: Dataset, error_line: ErrorLine) -> None:
    assert "is a run of pretrain, which has no classifier" in error_line("evaluate", pretrained, val.folder)
    file = pretrained / "checkpoints" / "step-00000012" / "weights.safetensors"
    assert "without a classifier; train one with `maelstream finetune`" in error_line("evaluate", file, val.folder)


def test_an_unknown_number_of_heads_or_a_wrong_shape_is_a_one_line_error(
    classifier: Path, val: Dataset, tmp_path: Path, error_line: ErrorLine
) -> None:
    assert "give --heads" in error_line("evaluate", classifier, val.folder)
    weights = torch.load(classifier)["model"] | {"blocks.1.mlp.fc1.weight": torch.zeros(7, 48)}
    torch.save(weights, tmp_path / "other.pth")
    error = error_line("evaluate", tmp_path / "other.pth", val.folder, "--heads", 3)
    assert "blocks.1.mlp.fc1.weight is (7, 48) where the model has (192, 48)" in error


def test_data_without_labels_with_too_few_images_or_other_classes_is_a_one_line_error(
    pretrained: Path, classifier: Path, train: Dataset, packed: Dataset, tmp_path: Path, error_line: ErrorLine
) -> None:
    (tmp_path / "flat").mkdir()
    for number, image in enumerate(sorted(Path(train.folder).parent.glob("images/*/00[01].jpg"))):
        shutil.copy(image, tmp_path / "flat" / f"{number}.jpg")
    assert pack([str(tmp_path / "flat"), str(tmp_path / "unlabelled"), "--workers", "1"]) == 0
    assert "has no labels" in error_line("evaluate", classifier, tmp_path / "unlabelled", "--heads", 3)
    assert "has no labels" in error_line("knn", pretrained, train.folder, tmp_path / "unlabelled")
    assert "7 classes" in error_line("knn", pretrained, train.folder, packed.folder)
    assert "--k 64" in error_line("knn", pretrained, train.folder, train.folder, "--k", 64)


@pytest.mark.parametrize("option", [("--k", "0"), ("--temperature", "0"), ("--margin", "0.5"), ("--threads", "-1")])
def test_options_out_of_range_are_a_one_line_error(
    pretrained: Path, train: Dataset, option: tuple[str, str], error_line: ErrorLine
) -> None:
    assert option[0] in error_line("knn", pretrained, train.folder, train.folder, *option)


def test_an_encoder_that_does_not_fit_its_run_is_a_one_line_error(
    pretrained: Path, train: Dataset, tmp_path: Path, error_line: ErrorLine
) -> None:
    shutil.copytree(pretrained, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(dump_recipe(Recipe(model=replace(MODEL, depth=3))))
    assert "blocks.2" in error_line("knn", tmp_path / "run", train.folder, train.folder)
