"""A stopped run resumes exactly: bit-identical on the same number of ranks, else up to summation order."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maelstream.jobs.run_folder.folder import RunFolder
from tests.helpers.forked import run_ranks

STEPS = 12
Uninterrupted = Callable[[tuple[str, ...]], RunFolder]


def engine(zero: int, precision: str, offload: bool = False) -> tuple[str, ...]:
    more = ("--engine.offload-optimizer",) if offload else ()
    return ("--engine.zero", str(zero), "--engine.precision", precision, "--optim.clip-grad", "0.3", *more)


ENGINES = {
    f"zero{zero}-{precision}{'-offload' if offload else ''}": engine(zero, precision, offload)
    for zero, precision, offload in (
        (1, "bf16", False),
        (2, "bf16", False),
        (3, "bf16", False),
        (1, "fp32", False),
        (3, "fp32", False),
        (2, "bf16", True),
        (3, "bf16", True),
    )
}


@pytest.fixture(scope="module")
def uninterrupted(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Runs on 2 ranks without a stop; each is made once."""
    made: dict[tuple[str, ...], RunFolder] = {}

    def run(options: tuple[str, ...]) -> RunFolder:
        if options not in made:
            folder = tmp_path_factory.mktemp("runs")
            run_ranks(2, tiny, "--run", str(folder / "run"), *options, output=folder / "output")
            made[options] = RunFolder(folder / "run")
        return made[options]

    return run


def metrics_of(folder: RunFolder) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in folder.read_metrics()]


def same_weights(ours: RunFolder, theirs: RunFolder) -> bool:
    one, other = ours.checkpoints.weights(STEPS), theirs.checkpoints.weights(STEPS)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_stopped_and_resumed_is_bit_identical_on_as_many_ranks(
    uninterrupted: Uninterrupted, tiny: str, tmp_path: Path, name: str
) -> None:
    for more in (["--stop-at-step", "7"], []):
        run_ranks(2, tiny, "--run", str(tmp_path / "run"), *ENGINES[name], *more, output=tmp_path / "output")
    ours, theirs = RunFolder(tmp_path / "run"), uninterrupted(ENGINES[name])
    assert [step for step, *_ in metrics_of(ours)] == list(range(1, STEPS + 1))
    assert metrics_of(ours) == metrics_of(theirs) and same_weights(ours, theirs)


@pytest.mark.parametrize("name", [name for name in ENGINES if "offload" not in name])
def test_other_numbers_of_ranks_resume_the_same_run(
    uninterrupted: Uninterrupted, tiny: str, tmp_path: Path, name: str
) -> None:
    """2 -> 1 -> 3 -> 4 -> 2 ranks, changing in the middle of epochs.

    Weight decay on the group without it would move a norm's weights by 1e-3. The gradient of the keys' bias is pure
    rounding error, which Adam amplifies, so that parameter is not compared.
    """
    for ranks, stop in ((2, 2), (1, 4), (3, 7), (4, 9), (2, 99)):
        more = ("--run", str(tmp_path / "run"), "--stop-at-step", str(stop))
        run_ranks(ranks, tiny, *more, *ENGINES[name], output=tmp_path / "output")
    ours, theirs = RunFolder(tmp_path / "run"), uninterrupted(ENGINES[name])
    exact = 1e-6 if "fp32" in name else 1e-4
    for (step, loss, _), (_, expected, _) in zip(metrics_of(ours), metrics_of(theirs), strict=True):
        assert loss == pytest.approx(expected, rel=exact), step
    if "fp32" in name:
        weights = theirs.checkpoints.weights(STEPS)
        for key, weight in ours.checkpoints.weights(STEPS).items():
            if not key.endswith("qkv.bias"):
                torch.testing.assert_close(weight, weights[key], rtol=1e-4, atol=1e-5, msg=key)


def test_a_run_resumes_at_another_zero_stage(uninterrupted: Uninterrupted, tiny: str, tmp_path: Path) -> None:
    """In float32 the stages differ only in summation order."""
    for number, zero in enumerate((1, 3, 2, 1)):
        more = ("--run", str(tmp_path / "run"), "--stop-at-step", str(3 * number + 3))
        run_ranks(2, tiny, *more, *engine(zero, "fp32"), output=tmp_path / "output")
    for (step, loss, _), (_, expected, _) in zip(
        metrics_of(RunFolder(tmp_path / "run")), metrics_of(uninterrupted(ENGINES["zero1-fp32"])), strict=True
    ):
        assert loss == pytest.approx(expected, rel=1e-6), step


def test_clipping_changes_the_losses_and_activation_checkpointing_does_not(
    uninterrupted: Uninterrupted, tiny: str, tmp_path: Path
) -> None:
    folder, options = str(tmp_path / "run"), ENGINES["zero1-fp32"]
    run_ranks(2, tiny, "--run", folder, *options, "--engine.activation-checkpointing", output=tmp_path / "output")
    run_ranks(2, tiny, "--run", f"{folder}-free", *options, "--optim.clip-grad", "0", output=tmp_path / "output")
    clipped = metrics_of(uninterrupted(options))
    assert metrics_of(RunFolder(Path(folder))) == clipped  # the same numbers, recomputed
    assert max(norm for *_, norm in clipped) > 0.3  # something was clipped
    assert metrics_of(RunFolder(Path(f"{folder}-free")))[-1] != clipped[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; compiling for a CPU takes minutes")
def test_a_compiled_model_trains_to_the_same_losses(tiny: str, tmp_path: Path) -> None:
    """In new processes: the process that ranks are forked from may have used the GPU."""
    running = []
    for name, more in (("eager", []), ("compiled", ["--engine.compile"])):
        options = ["--run", str(tmp_path / name), *ENGINES["zero1-fp32"], *more, "--stop-at-step", "3"]
        running.append(subprocess.Popen([sys.executable, "-m", "maelstream.jobs.pretrain", tiny, *options]))
    assert [process.wait() for process in running] == [0, 0]
    eager, compiled = (metrics_of(RunFolder(tmp_path / name)) for name in ("eager", "compiled"))
    assert [loss for _, loss, _ in compiled] == pytest.approx([loss for _, loss, _ in eager], rel=1e-5)
