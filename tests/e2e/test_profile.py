"""`maelstream profile` on the command line: it measures each stage and names the bottleneck."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maelstream.jobs.command import run
from maelstream.jobs.recipe import load_recipe
from maelstream.model.memory import activation_bytes, state_bytes
from maelstream.pipeline.config import STAGES
from maelstream.shards.dataset import Dataset
from tests.helpers.forked import run_ranks, start

RATES = {"images_per_s", "bytes_per_s", "limit_images_per_s"}
END_TO_END = {
    "steps",
    "images_per_s",
    "images_per_s_with_the_recipe_s_batch",
    "bytes_per_s",
    "step_s",
    "data_wait",
    "data_wait_p50_s",
    "data_wait_p99_s",
    "cpu_utilisation",
    "gpu_utilisation",
    "rss_bytes",
    "gpu_bytes",
    "mfu_measured",
    "mfu_datasheet",
    "engine_images_per_s",
    "engine_share",
    "engine_noise",
}


def profile(tiny: str, folder: Path, *options: str, ranks: int = 1, fault: str = "") -> tuple[dict[str, Any], str]:
    """The figures of the JSON file, and the output."""
    files = ["--json", str(folder / "p.json"), "--out", str(folder / "p.png")]
    output = folder / "output"
    done = run_ranks(ranks, tiny, "--seconds", "0.2", *files, *options, output=output, fault=fault, command="profile")
    return json.loads((folder / "p.json").read_text()), done.printed


def test_a_profile_has_all_stages_the_whole_run_a_chart_and_a_trace(tiny: str, tmp_path: Path) -> None:
    figures, printed = profile(tiny, tmp_path, "--trace", str(tmp_path / "trace.json"))
    assert figures["version"] == 1 and list(figures["stages"]) == list(STAGES)
    for name, stage in figures["stages"].items():
        assert stage.keys() == RATES | {"why"}
        if name in ("copy", "comm"):
            assert stage["images_per_s"] is None and stage["why"]
        else:
            assert stage["images_per_s"] > 0
    run = figures["whole"]
    assert run.keys() == END_TO_END
    assert 0 <= run["data_wait_p50_s"] <= run["data_wait_p99_s"] <= 10 * run["step_s"]
    assert 0 <= run["data_wait"] <= 1 and 0 < run["mfu_measured"] < 1 and run["rss_bytes"] > 2**27
    assert figures["verdict"].keys() == {"limit", "factor", "advice", "words"}
    assert figures["verdict"]["limit"] in STAGES and figures["verdict"]["factor"] >= 1
    for word in ("storage", "optimizer", "one rank", "MFU", "data wait", "p99", "limits the run"):
        assert word in printed
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 800
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = {event["name"] for event in events if event.get("ph") == "X"}
    assert {"storage", "read", "decode", "augment", "copy", "step", "optimizer", "comm"} <= named


@pytest.mark.parametrize("stage", ["storage", "decode", "step"])
def test_the_slow_stage_is_the_bottleneck(stage: str, tiny: str, tmp_path: Path) -> None:
    figures, _ = profile(tiny, tmp_path, fault=f"slow_{stage}:0.25")
    assert figures["verdict"]["limit"] == stage
    assert figures["verdict"]["factor"] > 1.5
    waits = figures["whole"]["data_wait"]
    assert waits < 0.2 if stage == "step" else waits > 0.5


def test_two_ranks_exchange_gradients_and_report_their_rates_together(tiny: str, tmp_path: Path) -> None:
    figures, _ = profile(tiny, tmp_path, "--stages", "step,optimizer,comm", ranks=2)
    assert figures["ranks"] == 2 and list(figures["stages"]) == ["step", "optimizer", "comm"]
    assert figures["stages"]["comm"]["bytes_per_s"] > 0
    assert figures["whole"]["steps"] >= 3


def test_profiling_only_the_data_path_starts_no_engine(tiny: str, tmp_path: Path) -> None:
    figures, printed = profile(tiny, tmp_path, "--stages", "read,decode")
    assert list(figures["stages"]) == ["read", "decode"] and figures["whole"] is None
    assert "data wait" not in printed


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--stages", "decod"], "there is no 'decod'; the nearest is 'decode'"),
        (["--stages", ","], "--stages names none of"),
        (["--seconds", "0"], "--seconds 0.0 must be more than 0"),
        (["--stages", "read", "--trace", "t.json"], "--trace records whole steps"),
        (["--out", "nowhere/x.png"], "nowhere/x.png cannot be written"),
        (["--engine.micro-batch-size", "99", "--optim.batch-size", "99"], "is too small to measure: 60 samples"),
        (["--loader.decode.on", "gpu", "--stages", "decode"], "torch finds none"),
    ],
)
def test_bad_input_is_an_error_of_one_line(
    tiny: str, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert run("profile", [tiny, *options]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1


@pytest.mark.parametrize("bf16", [False, True], ids=["no bf16 instructions", "bf16 instructions"])
@pytest.mark.parametrize("images", [0, 2])
def test_a_micro_batch_larger_than_cpu_memory_is_an_error_of_one_line(
    tiny: str, tmp_path: Path, images: int, bf16: bool
) -> None:
    """With bf16 instructions an element of an activation has 2 bytes, without them 4."""
    recipe = load_recipe(Path(tiny))
    image = activation_bytes(recipe.model, False, 2 if bf16 else 4)
    free = sum(state_bytes(recipe.model, 1, 1)[:5]) + images * image + image // 2
    advice = f"the largest that does is {images}: --engine.micro-batch-size {images}" if images else "not even 1 does"
    assert error_line(tiny, tmp_path, f"little_memory:{free},{bf16:d}") == (
        f"maelstream profile: engine.micro_batch_size 6 does not fit into the memory of cpu; {advice}, or "
        "--engine.activation-checkpointing"
    )


def test_a_micro_batch_larger_than_gpu_memory_is_an_error_of_one_line(tiny: str, tmp_path: Path) -> None:
    printed = error_line(tiny, tmp_path, "out_of_memory:4")
    assert "engine.micro_batch_size 6 does not fit" in printed and "the largest that does is 4: --engine" in printed


def test_a_profiler_without_permission_is_an_error_of_one_line(tiny: str, tmp_path: Path) -> None:
    trace = ["--trace", str(tmp_path / "trace.json")]
    printed = error_line(tiny, tmp_path, "no_profiler:CUPTI_ERROR_INSUFFICIENT_PRIVILEGES", *trace)
    assert printed.startswith("maelstream profile: --trace: the profiler is not permitted here (CUPTI_ERROR_INSUFF")


def error_line(tiny: str, folder: Path, fault: str, *options: str) -> str:
    """The line that the command prints; its exit code must be 2."""
    files = ["--out", str(folder / "p.png"), "--stages", "step", "--seconds", "0.1"]
    running = start(1, tiny, *files, *options, output=folder / "output", fault=fault, command="profile")
    assert running.wait() == [2], running.printed
    assert running.printed.count("\n") == 1 and not (folder / "p.png").exists()
    return running.printed.strip()


def test_an_option_before_the_recipe_is_an_error(capsys: pytest.CaptureFixture[str], packed: Dataset) -> None:
    assert run("profile", ["--seconds", "1"]) == 2
    assert "RECIPE comes first" in capsys.readouterr().err
