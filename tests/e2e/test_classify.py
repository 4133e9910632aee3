"""Fine-tuning, probing, partial tuning and training from scratch resume exactly and train the right parameters."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from maelstream.jobs.command import run
from maelstream.jobs.evaluation.results import Evaluation, read_evaluations
from maelstream.jobs.pack import main as pack
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import Dataset, with_checksum
from tests.conftest import write_images
from tests.helpers.forked import run_ranks, start

STEPS = 8
SMALL = """
optim: {batch_size: 12, base_lr: 0.02, warmup_epochs: 0.5, epochs: 1.6}
engine: {micro_batch_size: 3, precision: fp32}
log: {every_steps: 1}
checkpoint: {every_steps: 4, keep: 9}
"""  # 8 steps, 5 an epoch
Trained = Callable[..., RunFolder]
JOBS = {
    "finetune": ("--model.drop-path", "0.2"),
    "linprobe": ("--tuning.lrs", "0.5", "2"),
    "partial": ("--blocks", "0.5"),
    "scratch": ("--tuning.ema", "0.6"),
}
ENGINES = {
    "finetune": ("--engine.zero", "2", "--engine.precision", "bf16"),
    "linprobe": ("--engine.zero", "3", "--engine.precision", "bf16"),
    "partial": ("--engine.zero", "1", "--engine.precision", "bf16"),
    "scratch": ("--engine.zero", "3"),
}


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """21 other samples of the classes of `packed`."""
    folder = tmp_path_factory.mktemp("val")
    write_images(folder / "images", classes=3, per_class=7, seed=5)
    assert pack([str(folder / "images"), str(folder / "shards"), "--workers", "1"]) == 0
    return Dataset.open(folder / "shards")


@pytest.fixture(scope="module")
def pretrained(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    run_ranks(1, tiny, "--run", str(folder / "run"), "--stop-at-step", "2", output=folder / "output")
    return folder / "run"


@pytest.fixture(scope="module")
def command(pretrained: Path, packed: Dataset, val: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Returns the arguments of a command: a small recipe on top of the command's default."""
    folder = tmp_path_factory.mktemp("recipes")

    def arguments(job: str) -> list[str]:
        base = Path(__file__).parents[2] / "recipes" / ("finetune" if job == "partial" else job) / "base.yaml"
        values = yaml.safe_load(SMALL) | {"base": str(base)}
        if job == "scratch":
            values["model"] = {"image_size": [32, 32], "patch_size": 8, "dim": 48, "depth": 2, "heads": 3}
        path = folder / f"{job}.yaml"
        path.write_text(yaml.safe_dump(values))
        weights = [] if job == "scratch" else [str(pretrained)]
        return [*weights, packed.folder, val.folder, "--recipe", str(path)]

    return arguments


@pytest.fixture(scope="module")
def uninterrupted(command: Callable, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs without a stop; each is made once."""
    made: dict[tuple, RunFolder] = {}

    def trained(job: str, ranks: int, *options: str) -> RunFolder:
        key = (job, ranks, *options)
        if key not in made:
            folder = tmp_path_factory.mktemp("runs")
            options_of_run = (*command(job), "--run", str(folder / "run"), *options)
            run_ranks(ranks, *options_of_run, output=folder / "output", command=job)
            made[key] = RunFolder(folder / "run")
        return made[key]

    return trained


def metrics_of(folder: RunFolder) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"], line.get("top1")) for line in folder.read_metrics()]


def same(ours: RunFolder, theirs: RunFolder, kind: str = "weight") -> bool:
    one, other = ours.checkpoints.weights(STEPS, kind), theirs.checkpoints.weights(STEPS, kind)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("job", JOBS)
def test_a_run_stopped_and_resumed_is_bit_identical(
    uninterrupted: Trained, command: Callable, tmp_path: Path, job: str
) -> None:
    """On two ranks, in the middle of an epoch, with stochastic depth, running statistics and EMA."""
    for more in (["--stop-at-step", "3"], []):
        arguments = [*command(job), "--run", str(tmp_path / "run"), *JOBS[job], *ENGINES[job], *more]
        run_ranks(2, *arguments, output=tmp_path / "output", command=job)
    ours, theirs = RunFolder(tmp_path / "run"), uninterrupted(job, 2, *JOBS[job], *ENGINES[job])
    assert [step for step, *_ in metrics_of(ours)] == list(range(1, STEPS + 1))
    assert metrics_of(ours) == metrics_of(theirs) and same(ours, theirs)
    (result,), (expected,) = read_evaluations(ours.path), read_evaluations(theirs.path)
    assert (result.top1, result.settings["all"]) == (expected.top1, expected.settings["all"])
    if job == "scratch":
        assert same(ours, theirs, "ema")
        mean, weights = theirs.checkpoints.weights(STEPS, "ema"), theirs.checkpoints.weights(STEPS)
        assert not torch.equal(mean["head.weight"], weights["head.weight"])


def test_a_killed_run_resumes_from_its_last_checkpoint(
    uninterrupted: Trained, command: Callable, tmp_path: Path
) -> None:
    arguments = [*command("finetune"), "--run", str(tmp_path / "run"), *JOBS["finetune"], *ENGINES["finetune"]]
    running, ours = start(2, *arguments, output=tmp_path / "output", command="finetune"), RunFolder(tmp_path / "run")
    while not (lines := ours.read_metrics()) or lines[-1]["step"] < 6:
        assert any(rank.is_alive() for rank in running.ranks), running.printed
        time.sleep(0.005)
    running.kill()
    run_ranks(2, *arguments, output=tmp_path / "output", command="finetune")
    theirs = uninterrupted("finetune", 2, *JOBS["finetune"], *ENGINES["finetune"])
    assert metrics_of(ours) == metrics_of(theirs) and same(ours, theirs)


@pytest.mark.parametrize("zero", ["2", "3"])
@pytest.mark.parametrize("job", ["linprobe", "scratch"])
def test_zero_stages_differ_only_in_summation_order(
    uninterrupted: Trained, command: Callable, tmp_path: Path, job: str, zero: str
) -> None:
    """Changes from one rank to two and from stage 1 in mid-run; the EMA and the momentum of LARS are kept."""
    for ranks, more in ((1, ["--stop-at-step", "3"]), (2, ["--engine.zero", zero])):
        micro = ["--engine.micro-batch-size", "6"] if ranks == 2 else ["--engine.micro-batch-size", "12"]
        options = [*command(job), "--run", str(tmp_path / "run"), *JOBS[job], *micro, *more]
        if job == "scratch":  # mixup depends on how the batch is split
            options += ["--mixup.mixup", "0", "--mixup.cutmix", "0", "--model.drop-path", "0"]
        run_ranks(ranks, *options, output=tmp_path / "output", command=job)
    alone = ["--mixup.mixup", "0", "--mixup.cutmix", "0", "--model.drop-path", "0"] if job == "scratch" else []
    theirs = uninterrupted(job, 1, *JOBS[job], *alone, "--engine.micro-batch-size", "12")
    ours = RunFolder(tmp_path / "run")
    for (step, loss, *_), (_, expected, *_) in zip(metrics_of(ours), metrics_of(theirs), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5), step
    for kind in ("weight", "ema") if job == "scratch" else ("weight",):
        expected_weights = theirs.checkpoints.weights(STEPS, kind)
        for name, weight in ours.checkpoints.weights(STEPS, kind).items():
            if not name.endswith("qkv.bias"):  # the gradient of the keys' bias is rounding error
                torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=2e-5, msg=name)


def test_probes_trained_together_equal_probes_trained_alone(uninterrupted: Trained) -> None:
    together = uninterrupted("linprobe", 1, "--tuning.lrs", "0.5", "2").checkpoints.weights(STEPS)
    for number, lr in enumerate(("0.5", "2")):
        alone = uninterrupted("linprobe", 1, "--tuning.lrs", lr).checkpoints.weights(STEPS)
        for part in ("weight", "bias"):
            assert torch.equal(together[f"head.1.{number}.{part}"], alone[f"head.1.{part}"])
        assert torch.equal(together["head.0.running_mean"], alone["head.0.running_mean"])
    assert not torch.equal(together["head.1.0.weight"], together["head.1.1.weight"])


@pytest.mark.parametrize(
    ("blocks", "moved"),
    [
        ("0", ["head."]),
        ("0.5", ["blocks.1.mlp.", "blocks.1.norm2.", "fc_norm.", "head."]),
        ("1", ["blocks.1.", "fc_norm.", "head."]),
    ],
)
def test_partial_tuning_trains_what_it_names(uninterrupted: Trained, blocks: str, moved: list[str]) -> None:
    store = uninterrupted("partial", 2 if blocks == "0.5" else 1, "--blocks", blocks).checkpoints
    first, last = store.weights(4), store.weights(STEPS)
    assert {name for name in last if not torch.equal(first[name], last[name])} == {
        name for name in last if name.startswith(tuple(moved))
    }


def test_a_frozen_encoder_is_the_pretrained_one(uninterrupted: Trained, pretrained: Path) -> None:
    encoder = RunFolder(pretrained).checkpoints.weights(2)
    probe = uninterrupted("linprobe", 1, "--tuning.lrs", "0.5", "2").checkpoints.weights(STEPS)
    shared = encoder.keys() & probe.keys()
    assert len(shared) > 20 and all(torch.equal(encoder[name], probe[name]) for name in shared)


def test_results_are_recorded_in_the_run_and_in_the_run_of_the_weights(
    uninterrupted: Trained, pretrained: Path, val: Dataset
) -> None:
    folder = uninterrupted("linprobe", 1, "--tuning.lrs", "0.5", "2")
    (result,) = read_evaluations(folder.path)
    assert result in read_evaluations(pretrained)
    assert (result.job, result.step, result.images, result.epochs) == ("linprobe", 2, len(val), 1.6)
    assert set(result.settings["all"]) == {"lr 0.5", "lr 2"}
    assert result.top1 == max(scores["top1"] for scores in result.settings["all"].values())
    assert metrics_of(folder)[-1][-1] == result.top1


def test_a_missing_result_is_written_by_the_same_command(
    command: Callable, uninterrupted: Trained, tmp_path: Path
) -> None:
    """The run was killed between its last checkpoint and the result."""
    folder = uninterrupted("linprobe", 1, "--tuning.lrs", "0.5")
    before = (folder.path / "result.json").read_text()
    (folder.path / "result.json").unlink()
    arguments = [*command("linprobe"), "--run", str(folder.path), "--tuning.lrs", "0.5"]
    run_ranks(1, *arguments, output=tmp_path / "output", command="linprobe")
    assert (folder.path / "result.json").read_text().split('"finished"')[0] == before.split('"finished"')[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_does_not_change_the_losses(uninterrupted: Trained, precision: str) -> None:
    """Stochastic depth also drops the same paths. Without bf16 instructions, recomputing rounds differently."""
    options = (*JOBS["finetune"], "--engine.precision", precision)
    twice = uninterrupted("finetune", 1, *options, "--engine.activation-checkpointing")
    for (step, loss, *_), (_, expected, *_) in zip(
        metrics_of(twice), metrics_of(uninterrupted("finetune", 1, *options)), strict=True
    ):
        assert loss == (expected if precision == "fp32" else pytest.approx(expected, rel=1e-2)), step


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("others", "3, and they differ"),
        ("unlabelled", "has no labels"),
        ("few", "each class needs at least one"),
    ],
)
def test_data_without_usable_classes_gets_one_line(
    pretrained: Path, packed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str, complaint: str
) -> None:
    folder = write_images(tmp_path / "images", classes=2 if data == "others" else 1, per_class=3)
    src = folder / "class00" if data == "unlabelled" else folder
    assert pack([str(src), str(tmp_path / "shards"), "--workers", "1"]) == 0
    if data == "few":
        manifest = tmp_path / "shards" / "dataset.json"
        values = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(with_checksum(values | {"classes": ["a", "b", "c", "d"]})))
    other = str(tmp_path / "shards")
    capsys.readouterr()
    val = other if data == "few" else packed.folder
    assert run("linprobe", [str(pretrained), other, val, "--run", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1 and not (tmp_path / "run").exists()


def test_training_does_not_start_from_a_classifier(
    uninterrupted: Trained, packed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = uninterrupted("linprobe", 1, "--tuning.lrs", "0.5").checkpoints
    table = torch.zeros(1, 17, 48)
    save_file(store.weights(STEPS) | {"pos_embed": table}, tmp_path / "classifier.safetensors")
    arguments = [str(tmp_path / "classifier.safetensors"), packed.folder, packed.folder]
    assert run("finetune", [*arguments, "--run", str(tmp_path / "run")]) == 2
    assert "holds a classifier of 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "more", "complaint"),
    [
        ("finetune", ["--model.depth", "3"], "and the model is ViT/8 (48 x 3)"),
        ("linprobe", ["--model.classes", "5"], "model.classes 5"),
        ("partial", [], "partial needs --blocks"),
        ("linprobe", ["--model.drop-path", "0.1"], "exact features"),
        ("partial", ["--blocks", "3"], "tuning.blocks 3: the encoder has 2"),
    ],
)
def test_bad_input_gets_one_line(
    command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str, more: list[str], complaint: str
) -> None:
    assert run(job, [*command(job), "--run", str(tmp_path / "run"), *more]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def evaluated(folder: RunFolder, val: Dataset, tmp_path: Path) -> tuple[Evaluation, str]:
    """Scores with two ranks; returns the evaluation and what the ranks printed."""
    result, output = tmp_path / "result", tmp_path / "output"
    run_ranks(2, str(folder.path), val.folder, "--folder", str(result), output=output, command="evaluate")
    return read_evaluations(result)[0], output.read_text()


@pytest.mark.parametrize("job", ["finetune", "linprobe", "scratch"])
def test_evaluate_equals_the_scores_that_the_run_recorded_for_each_head(
    job: str, uninterrupted: Trained, val: Dataset, tmp_path: Path
) -> None:
    folder = uninterrupted(job, 1, *JOBS[job])
    own = read_evaluations(folder.path)[0]
    found, _ = evaluated(folder, val, tmp_path)
    assert len(found.settings["all"]) == (1 if job == "finetune" else 2)
    assert found.settings["all"] == own.settings["all"] and (found.top1, found.top5) == (own.top1, own.top5)
    assert (found.settings["trained_step"], found.step) == (STEPS, own.step)
    assert found in read_evaluations(folder.path)


def test_evaluate_uses_the_newest_good_checkpoint_and_does_not_change_the_run(
    uninterrupted: Trained, val: Dataset, tmp_path: Path
) -> None:
    folder = RunFolder(shutil.copytree(uninterrupted("finetune", 1, *JOBS["finetune"]).path, tmp_path / "run"))
    newest = folder.checkpoints.at(STEPS)
    with (newest / "weights.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x7f\x7f\x7f\x7f")
    found, printed = evaluated(folder, val, tmp_path)
    assert found.settings["trained_step"] == 4 and "weights.safetensors is damaged" in printed
    assert newest.is_dir() and folder.checkpoints.steps() == [4, STEPS]


def test_a_long_evaluation_is_not_reported_as_a_hang(command: Callable, tmp_path: Path) -> None:
    options = ("--run", str(tmp_path / "run"), "--health.silent-s", "4", "--tuning.evaluate-every-epochs", "0")
    slow = "slow_evaluation:3"  # two micro-batches per rank
    ranks = start(2, *command("linprobe"), *options, output=tmp_path / "said", fault=slow, command="linprobe")
    assert ranks.wait() == [0, 0], ranks.printed
