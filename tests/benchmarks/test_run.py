"""`make bench` names failures and missing peers, and keeps the output of what ran."""

import sys
from pathlib import Path

import pytest

from benchmarks import run


def test_a_benchmark_that_fails_is_named_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = run.Benchmark("benchmarks.nowhere", (), ())
    fine = run.Benchmark("this", (), ())  # prints the Zen of Python
    monkeypatch.setattr(run, "benchmarks", lambda *_: {"loaders": broken, "pack": fine})
    out = tmp_path / "device.md"
    monkeypatch.setattr(sys, "argv", ["run", "--parts", "loaders", "pack", "--out", str(out)])
    assert run.main() == 1
    text = out.read_text()
    assert "**Failed**, exit code 1" in text and "No module named benchmarks.nowhere" in text
    assert "python -m this\n\n```\nThe Zen of Python" in text
    assert "loaders: exit code 1" in capsys.readouterr().err


def test_versions_and_missing_peers_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.PEERS, "no-such-loader", "no_such_loader")
    text = run.document("a device", {}, quick=True)
    assert "* no-such-loader: not measured, not installed here" in text
    assert "* ffcv: not measured, its source on PyPI" in text
    assert "torch 2." in text and "Few rounds" in text


def test_the_file_is_named_after_the_device() -> None:
    assert run.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.md"
    assert run.file_name("AMD EPYC, 2 cores") == "amd-epyc-2-cores.md"
