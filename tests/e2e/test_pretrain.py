"""Pre-training as a user runs it: two ranks under the deepspeed launcher; stop, resume, reconstruct, report."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maelstream.jobs.command import run
from maelstream.jobs.reporting.reconstruction_files import read_info
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import Dataset
from tests.helpers.forked import start

ROOT = Path(__file__).parents[2]
STEPS = 12
RECIPE = f"""
model: {{image_size: [32, 32], patch_size: 8, dim: 48, depth: 2, heads: 3, decoder_dim: 32, decoder_depth: 1,
         decoder_heads: 4}}
optim: {{batch_size: 10, base_lr: 0.05, warmup_epochs: 0.5, epochs: {STEPS * 10 / 60}}}
engine: {{micro_batch_size: 3}}
log: {{every_steps: 1}}
checkpoint: {{every_steps: 4, keep: 2}}
"""


def launch(ranks: int, *args: str) -> subprocess.CompletedProcess:
    """`deepspeed --num_gpus RANKS --module maelstream.jobs.pretrain ARGS`, as on the command line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--master_port", str(port)]
    command = [*deepspeed, "--num_gpus", str(ranks), "--module", "maelstream.jobs.pretrain", *args]
    # The runner passes PYTHONPATH on; with this PATH the ranks use the same python3.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def forked(ranks: int, *args: str) -> subprocess.CompletedProcess:
    """Runs the ranks without a launcher."""
    with tempfile.TemporaryDirectory() as folder:
        running = start(ranks, *args, output=Path(folder) / "output")
        codes = running.wait()
        return subprocess.CompletedProcess(args, max(codes, key=abs), "", running.printed)


@pytest.fixture(scope="module")
def recipe(packed: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE + f"data: {{dataset: {packed.folder}}}\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on 2 ranks without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = launch(2, str(recipe), "--run", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return RunFolder(folder)


def losses(folder: RunFolder) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["lr"]) for line in folder.read_metrics()]


def test_a_run_stopped_at_step_7_and_resumed_is_bit_identical(
    uninterrupted: RunFolder, recipe: Path, tmp_path: Path
) -> None:
    for more in (["--stop-at-step", "7"], []):
        done = forked(2, str(recipe), "--run", str(tmp_path / "run"), *more)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("resuming from step 7\n") == done.stderr.count("finished") == 1  # by rank 0 alone
    resumed = RunFolder(tmp_path / "run")
    assert [step for step, *_ in losses(resumed)] == list(range(1, STEPS + 1))
    assert losses(resumed) == losses(uninterrupted)
    ours, theirs = resumed.checkpoints.weights(STEPS), uninterrupted.checkpoints.weights(STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_rank_trains_on_the_same_batches_as_two(uninterrupted: RunFolder, recipe: Path, tmp_path: Path) -> None:
    """Losses differ in summation order and in the bf16 rounding of each rank's gradients."""
    assert forked(1, str(recipe), "--run", str(tmp_path / "run")).returncode == 0
    for (step, single, _), (_, shared, _) in zip(
        losses(RunFolder(tmp_path / "run")), losses(uninterrupted), strict=True
    ):
        assert single == pytest.approx(shared, rel=1e-6 if step == 1 else 2e-3)


def test_the_run_folder_holds_recipe_curves_and_checkpoints(uninterrupted: RunFolder) -> None:
    assert uninterrupted.checkpoints.steps() == [8, 12]  # every 4 steps, the newest 2 kept
    assert uninterrupted.recipe().optim.batch_size == 10
    assert list(uninterrupted.tensorboard.glob("events.*"))
    first, last = uninterrupted.read_metrics()[0], uninterrupted.read_metrics()[-1]
    assert first.keys() >= {"step", "epoch", "loss", "lr", "images_per_s", "data_wait"}
    assert first["lr"] == 0 and last["loss"] < 0.99 * first["loss"]


def test_weights_have_the_reference_s_names_and_are_float32(uninterrupted: RunFolder) -> None:
    weights = load_file(uninterrupted.path / "checkpoints" / "step-00000012" / "weights.safetensors")
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "decoder_pred.bias"} <= (
        weights.keys()
    )
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_trained_run_is_exported_as_it_was_saved(uninterrupted: RunFolder, tmp_path: Path) -> None:
    assert run("export", [str(uninterrupted.path), "--format", "reference", "--out", str(tmp_path / "out")]) == 0
    exported, trained = load_file(tmp_path / "out" / "weights.safetensors"), uninterrupted.checkpoints.weights(STEPS)
    assert exported.keys() - trained.keys() <= {"pos_embed", "decoder_pos_embed"}
    assert all(torch.equal(exported[name], trained[name]) for name in trained)


def test_a_finished_run_that_is_started_again_does_nothing(uninterrupted: RunFolder, recipe: Path) -> None:
    before = uninterrupted.metrics.read_bytes()
    again = forked(2, str(recipe), "--run", str(uninterrupted.path))
    assert again.returncode == 0 and uninterrupted.metrics.read_bytes() == before
    assert again.stderr.count(f"{uninterrupted.path} is finished already (12 steps)") == 1  # rank 0 alone prints it


def test_a_changed_experiment_is_rejected(
    uninterrupted: RunFolder, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("pretrain", [str(recipe), "--run", str(uninterrupted.path), "--model.depth", "3"])
    assert code == 2
    assert (
        "holds a run with another model.depth (2, now 3); give the old values again, or another --run"
        in capsys.readouterr().err
    )


def test_reconstruct_writes_images_and_keeps_those_of_the_run(
    uninterrupted: RunFolder, packed: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    own = uninterrupted.reconstructions / "step-00000012"
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    about = read_info(own)
    assert about is not None and len(about.names) == 6  # written by the run itself, for its last checkpoint
    assert run("reconstruct", [str(uninterrupted.path), "--count", "3", "--ratios", "0.5,0.75"]) == 0
    shown = uninterrupted.reconstructions / f"step-00000012-{Path(packed.folder).name}"
    assert sorted(path.name for path in shown.glob("*.png")) == ["grid.png", "ratio-0.5.png", "ratio-0.75.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in shown.glob("*.png"))
    about = read_info(shown)
    assert about is not None and (about.step, len(about.names)) == (12, 3)
    assert f"{shown}: 3 images" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_reconstruct_reads_plain_files_and_older_checkpoints(
    uninterrupted: RunFolder, packed: Dataset, tmp_path: Path
) -> None:
    images, older = Path(packed.folder).parent / "images", uninterrupted.checkpoints.at(8)
    options = [str(uninterrupted.path), "--images", str(images), "--weights", str(older)]
    assert run("reconstruct", [*options, "--count", "2"]) == 0
    about = read_info(uninterrupted.reconstructions / "step-00000008-images")
    assert about is not None and about.step == 8 and about.names == ("class00/000.jpg", "class02/019.jpg")
    assert run("reconstruct", [*options, "--out", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_trained_run_is_reported(uninterrupted: RunFolder) -> None:
    assert run("report", [str(uninterrupted.path), "--verify"]) == 0
    page = (uninterrupted.path / "report.html").read_text()
    assert "every byte is intact" in page and "data:image/png;base64," in page


def test_print_config_prints_a_recipe_that_resolves_to_itself(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pretrain", [str(recipe), "--print-config", "--optim.base-lr", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "base_lr: 0.5" in printed
    (tmp_path / "again.yaml").write_text(printed)
    assert run("pretrain", [str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.dataset", "nowhere"], "nowhere is not a packed dataset"),
        (["--optim.batch-size", "61"], "batch_size 61 is larger than the dataset"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert run("pretrain", [str(recipe), "--run", str(tmp_path / "run"), *more]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optim.batch-size", "0"], "batch_size 0 is not positive"),
        (["--model.patch-size", "7"], "not divisible by patch_size 7"),
        (["--optim.batchsize", "4"], "--optim.batch-size"),
    ],
)
def test_a_wrong_override_is_explained_with_exit_code_2(
    recipe: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert run("pretrain", [str(recipe), *more]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_more_ranks_than_samples_in_a_batch_get_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "11")
    assert run("pretrain", [str(recipe), "--run", str(tmp_path / "run")]) == 2
    assert "a batch of 10 samples cannot be shared by 11 ranks" in capsys.readouterr().err


def test_only_rank_0_prints_errors(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("pretrain", [str(recipe), "--run", str(tmp_path / "run"), "--data.dataset", "nowhere"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["reconstruct", "report"])
def test_a_folder_that_is_not_a_run_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(command, [str(tmp_path)]) == 2
    assert "is not a run: it has no config.yaml" in capsys.readouterr().err


def test_a_damaged_sample_ends_the_run_with_its_name_or_is_replaced(
    recipe: Path, packed: Dataset, tmp_path: Path
) -> None:
    """Overwrites the first sample in its shard; DALI would crash the process on it."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for path in Path(packed.folder).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with (copy / packed.shard_names[0]).open("r+b") as shard:
        shard.seek(int(packed.offset[0]))
        shard.write(b"GIF89a")
    options = [str(recipe), "--run", str(tmp_path / "run"), "--data.dataset", str(copy)]
    done = forked(1, *options, "--loader.max-bad-share", "0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"sample {packed.keys(np.array([0]))[0]}: not the bytes that were packed (CRC32C)" in done.stderr
    done = forked(1, *options, "--loader.max-bad-share", "0.02")
    assert done.returncode == 0, done.stderr
    (bad,) = {json.loads(line)["key"] for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()}
    assert bad == packed.keys(np.array([0]))[0]


def test_training_on_a_mix_and_reconstructing_it(recipe: Path, packed: Dataset, tmp_path: Path) -> None:
    """Also stops and resumes, with colour jitter, RandAugment and erasing enabled on the command line."""
    copy, folder = shutil.copytree(packed.folder, tmp_path / "copy"), str(tmp_path / "run")
    mixed = [str(recipe), "--run", folder, "--data.mix", packed.folder, "3", str(copy), "1"]
    augmentation = ["--data.crop.jitter", "0.4", "--data.crop.rand-augment", "9", "--data.crop.erase", "0.25"]
    for more in (["--stop-at-step", "2"], ["--stop-at-step", "3"]):
        done = forked(1, *mixed, *augmentation, *more)
        assert done.returncode == 0, done.stderr
    assert [line["step"] for line in RunFolder(Path(folder)).read_metrics()] == [1, 2, 3]
    assert run("reconstruct", [folder, "--count", "2"]) == 0
    done = forked(1, str(recipe), "--run", folder, "--data.mix", packed.folder, "1", str(copy), "1", *augmentation)
    assert done.returncode == 2 and "holds a run with another data.mix." in done.stderr


def test_metrics_after_the_last_checkpoint_are_removed_on_resume(tmp_path: Path, uninterrupted: RunFolder) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 5, "lo')  # killed while writing the last line
    folder.start(uninterrupted.recipe(), step=2)
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]


def test_a_half_written_checkpoint_is_not_listed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000008.writing").mkdir()
    assert folder.checkpoints.steps() == [4] and folder.last_step() == 4
