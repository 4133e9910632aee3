"""`make gpu-check`: the harness with the parts of tests/helpers/gpu_check_parts.py; every real part on the CPU."""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks import gpu, gpu_train
from benchmarks.gpu import PARTS, Outcome, Part, check, exit_code, table
from benchmarks.gpu_part import CannotRun, Setting, last_words, row_of, write_setting
from benchmarks.gpu_part import main as part_main
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import Dataset
from tests.helpers.forked import CONTEXT, start

PARTS_FOR_TESTS = "tests.helpers.gpu_check_parts"


@pytest.fixture
def setting(packed: Dataset, tiny: str, tmp_path: Path) -> Setting:
    """The CPU, 60 images, and models with a few thousand weights."""
    return Setting(
        device="cpu",
        source=str(packed.folder),
        work=str(tmp_path),
        seconds=0.1,
        images=130,
        recipes=dict.fromkeys(("demo", "B/16", "L/16", "H/14"), tiny),
        micro_batches={"B/16": 6, "L/16": 6, "H/14": 99},
        compile=False,
    )


def part(function: str, limit_s: float = 20, needs: tuple[str, ...] = ()) -> Part:
    return Part(function, f"{PARTS_FOR_TESTS}:{function}", limit_s, (), needs)


# --- the harness


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Rows of parts that end in every possible way, by part."""
    work = tmp_path_factory.mktemp("work")
    setting = Setting("cpu", "", str(work), 1.0, 1, {}, {}, False)
    parts = [part(name) for name in ("passes", "fails", "raises", "crashes", "writes_no_result")]
    parts += [part(name) for name in ("lacks_data", "lacks_a_package", "lacks_a_module_of_this_project")]
    parts += [part("hangs", 1.5), Part("last", f"{PARTS_FOR_TESTS}:passes", 20, ("x", 1), ())]
    parts += [Part("needy", f"{PARTS_FOR_TESTS}:passes", 20, (), ("passes", "lacks_data"))]
    row_counts: list[int] = []
    found = check(tuple(parts), setting, 1.0, lambda rows: row_counts.append(len(rows)))
    assert row_counts == sorted(row_counts) and len(row_counts) == len(parts) and row_counts[-1] == len(found)
    return {name: [row for row in found if row.part == name] for name in dict.fromkeys(row.part for row in found)}


def test_rows_of_a_part_pass_fail_or_report_a_figure(outcomes: dict[str, list[Outcome]]) -> None:
    assert [row.state for row in outcomes["passes"]] == ["passed", "reported"]
    assert [row.state for row in outcomes["fails"]] == ["passed", "failed"]
    assert outcomes["fails"][1].found == "0" and outcomes["passes"][0].figures == {"number": 2}


@pytest.mark.parametrize(
    ("name", "state", "found"),
    [
        ("raises", "failed", "exit code 1: ValueError: three is not four"),
        ("crashes", "failed", "killed by SIGSEGV in gpu_check_parts.py, line 27, crashes"),
        ("writes_no_result", "failed", "exit code 0: no output"),
        ("hangs", "failed", "not done after 2 s in gpu_check_parts.py, line 34, hangs"),
        ("lacks_data", "could not run", "no photographs[dev]"),
        ("lacks_a_package", "could not run", "no module no_such_package; see docs/gpu.md for the wheels"),
        (
            "lacks_a_module_of_this_project",
            "failed",
            "exit code 1: ModuleNotFoundError: No module named 'benchmarks.no_such_module'",
        ),
        ("needy", "could not run", "no photographs[dev]"),
    ],
)
def test_the_table_says_why_a_part_failed_or_could_not_run(
    outcomes: dict[str, list[Outcome]], name: str, state: str, found: str
) -> None:
    (row,) = outcomes[name]
    assert (row.state, row.found) == (state, found)


def test_parts_after_a_crash_or_a_hang_still_run(outcomes: dict[str, list[Outcome]]) -> None:
    assert outcomes["last"][0].found == "found ('x', 1)"


def test_no_process_of_a_part_that_hung_is_left(outcomes: dict[str, list[Outcome]]) -> None:
    assert outcomes["hangs"][0].seconds < 10
    time.sleep(0.1)
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not any(f"{PARTS_FOR_TESTS}:hangs".encode() in line for line in lines)


def test_the_exit_code_distinguishes_failed_from_not_run(outcomes: dict[str, list[Outcome]]) -> None:
    assert exit_code(outcomes["passes"]) == 0
    assert exit_code([*outcomes["passes"], *outcomes["lacks_data"]]) == 3
    assert exit_code([*outcomes["lacks_data"], *outcomes["fails"]]) == 1


def test_the_table_has_every_row_with_its_state(outcomes: dict[str, list[Outcome]]) -> None:
    rows = [row for each in outcomes.values() for row in each]
    console = Console(width=200, file=io.StringIO())
    console.print(table(rows, "a device"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a device" in printed and printed.count("could not run") == 3
    for row in rows:
        assert any(row.found in line and row.state in line for line in printed.splitlines()), row


def test_a_test_that_crashes_is_named() -> None:
    log = "tests/x.py::test_one PASSED [50%]\ntests/x.py::test_two[a] \nFatal Python error: Segmentation fault\n"
    assert last_words(log, -11, "") == "killed by SIGSEGV in x.py::test_two[a]"


def test_limits_fit_into_nine_minutes_and_needed_parts_come_first() -> None:
    assert sum(part.limit_s for part in PARTS) <= gpu.BUDGET_S == 540
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)
    for number, part in enumerate(PARTS):
        assert all(need in names[:number] for need in part.needs)


def test_a_part_whose_tests_all_skip_could_not_run_and_failures_are_named() -> None:
    def report(*cases: str) -> Any:
        return ElementTree.ElementTree(ElementTree.fromstring(f"<testsuite>{''.join(cases)}</testsuite>"))

    skipped = '<testcase name="a"><skipped message="no CUDA device"/></testcase>'
    failed = '<testcase name="b"><failure message="assert 1 == 2&#10;more"/></testcase>'
    with pytest.raises(CannotRun, match="all 1 tests skipped: no CUDA device"):
        row_of(report(skipped), ["x"])
    row = row_of(report(skipped, failed, '<testcase name="c"/>'), ["x"])
    assert row.found == "1 of 2 tests; 1 skipped: no CUDA device; b: assert 1 == 2" and not row.passed
    assert row_of(report('<testcase name="c"/>'), ["x"]).passed


def test_every_wheel_that_a_node_needs_is_pinned() -> None:
    names = [line for line in (gpu.ROOT / "docs/gpu-wheels.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {line.partition("==")[0] for line in (gpu.ROOT / "constraints.txt").read_text().splitlines()}
    assert len(names) > 50 and set(names) <= pinned


# --- the command


def command(*options: str, code: int) -> str:
    """The output of `python -m benchmarks.gpu`, of both streams."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-m", "benchmarks.gpu", *options]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_without_a_gpu_it_runs_to_its_end_and_every_part_gives_the_reason(tmp_path: Path) -> None:
    printed = command("--work", str(tmp_path), "--out", str(tmp_path / "g.json"), code=3)
    figures = json.loads((tmp_path / "g.json").read_text())
    assert figures["device"] == "no CUDA device" and figures["exit_code"] == 3 and figures["version"] == 1
    assert figures["versions"]["torch"] and figures["versions"]["nvidia-dali-cuda130"]
    assert [row["part"] for row in figures["rows"]] == [part.name for part in PARTS]
    assert {(row["state"], row["found"]) for row in figures["rows"]} == {("could not run", "no CUDA device")}
    assert all(part.name in printed for part in PARTS)


def test_bad_options_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for options, complaint in (
        (["--src", str(tmp_path / "none")], "is not a folder"),
        (["--seconds", "0"], "more than 0"),
        (["--parts", "nothing"], "there is no 'nothing'; one of device, data"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu", "--work", str(tmp_path), *options])
        try:
            code = gpu.main()
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
        printed = capsys.readouterr().err
        assert code == 2 and complaint in printed and printed.count("\n") == 1


# --- the parts' code, on the CPU


def rows(call: str, setting: Setting, *arguments: Any) -> list[dict[str, Any]]:
    """Rows of a part, in a process that has imported everything already."""
    folder = Path(setting.work)
    write_setting(setting, folder / "setting.json")
    result = folder / "result.json"
    given = (call, json.dumps(arguments), str(folder / "setting.json"), str(result))
    process = CONTEXT.Process(target=part_main, args=given)
    process.start()
    process.join()
    found = json.loads(result.read_text())
    return found.get("rows", [found])


def test_the_device_part_the_tests_part_and_a_part_without_a_gpu(setting: Setting) -> None:
    (device,) = rows("benchmarks.gpu_part:device", setting)
    assert device["passed"] and device["found"] == "cpu"
    (found,) = rows("benchmarks.gpu_part:tests", setting, "tests/model/test_patches.py")
    assert found["passed"] and found["figures"]["tests"] > 5
    (nothing,) = rows("benchmarks.gpu_part:device", replace(setting, device="cuda"))
    assert nothing == {"cannot_run": "no CUDA device"}


def test_images_of_a_folder_are_packed_and_a_packed_folder_is_used_as_it_is(setting: Setting, packed: Dataset) -> None:
    (taken,) = rows("benchmarks.gpu_part:data", setting)
    assert taken["figures"]["images"] == 60 and "packed" in taken["found"]
    images = packed.folder.rpartition("/")[0] + "/images"
    for _ in range(2):  # the files of an earlier check are replaced
        (made,) = rows("benchmarks.gpu_part:data", replace(setting, source=images))
        assert made["figures"]["images"] == 60 and Path(setting.work, "shards", "dataset.json").exists()


@pytest.mark.parametrize("form", ["window", "full"])
def test_a_form_of_decoding(setting: Setting, form: str) -> None:
    draws, pixels, endurance = rows("benchmarks.gpu_decode:form", setting, form)
    assert draws["passed"] and draws["figures"]["images"] == 480
    assert pixels["passed"] and pixels["figures"] == {"mean": 0.0, "worst": 0.0, "images": 240}
    assert endurance["figures"]["images"] >= 130 or not endurance["passed"]


def test_the_loader_against_decoding_alone(setting: Setting) -> None:
    bare, loader = rows("benchmarks.gpu_decode:loader", setting)
    assert bare["asked"] == "" and loader["asked"] == ">= 90%"
    assert loader["figures"]["share"] * loader["figures"]["decode_images_per_s"] == pytest.approx(
        loader["figures"]["loader_images_per_s"]
    )


class Forked:
    """A run in a forked process, which saves the seconds of imports."""

    def __init__(self, arguments: list[str], log: Path):
        fault = "die:2" if "--engine.zero 2" in " ".join(arguments) and "again" in log.name else ""
        self.running = start(1, *arguments, output=log, fault=fault)

    def wait(self) -> int:
        return self.running.wait()[0]


def test_runs_that_are_stopped_and_resumed_at_each_zero_stage_and_one_that_is_killed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_train, "start", Forked)
    rows = {row.what: row for row in gpu_train.resume(setting)}
    assert len(rows) == 9 and [row.what for row in rows.values() if not row.passed] == [
        "ZeRO 2, the same run once more"
    ]
    assert rows["ZeRO 2, the same run once more"].found == "killed by SIGKILL"
    assert "->" in rows["ZeRO 3, 8 steps"].found


def test_the_first_difference_of_two_runs_is_reported(tmp_path: Path) -> None:
    ours, theirs = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    for run, loss in ((ours, 1.0), (theirs, 1.5)):
        run.path.mkdir()
        run.metrics.write_text(json.dumps({"step": 1, "loss": loss, "grad_norm": 2.0}) + "\n")
    assert gpu_train.difference_of(ours, theirs) == "step 1: loss 1.0 and 1.5, norm 2.0 and 2.0"


def test_the_rates_of_a_model_and_its_trace(setting: Setting) -> None:
    found = {row["what"]: row for row in rows("benchmarks.gpu_train:rates", setting, "L/16")}
    assert found["MFU with the loader"]["asked"] == ">= 50%" and found["data wait"]["asked"] == "< 1%"
    assert found["step alone"]["figures"]["profile"]["whole"]["steps"] >= 3
    assert 0 < found["MFU with the loader"]["figures"]["mfu"] < 1
    (trace,) = rows("benchmarks.gpu_train:trace", setting)
    assert trace["passed"] and Path(setting.work, "trace.json.gz").stat().st_size > 1000


def test_a_micro_batch_is_no_larger_than_the_dataset(setting: Setting) -> None:
    found = {row["what"]: row for row in rows("benchmarks.gpu_train:rates", setting, "H/14")}
    assert "with the loader, micro-batch 12" in found or "with the loader, micro-batch 60" in found
    assert found["DeepSpeed's share of forward and backward"]["asked"] == "< 3%"
