"""The arithmetic of the paper's table 2, and models that share their weights."""

import json
from pathlib import Path

import pytest
import torch

from maelstream.jobs.command import run
from maelstream.jobs.profiling import table2_times
from maelstream.jobs.profiling.table2_times import (
    BATCH,
    MODELS,
    PAPER_HOURS,
    SIZES,
    Times,
    build_shared_models,
    images_per_s,
    rows,
)
from maelstream.model.config import MAEConfig

TINY = MAEConfig(
    image_size=(16, 16), patch_size=8, dim=24, depth=1, heads=3, decoder_dim=24, decoder_depth=8, decoder_heads=3
)


def test_hours_follow_from_the_rate_and_devices_share_the_gradients_but_not_the_update() -> None:
    times = Times(gradients_s=2.0, optimizer_s=0.0)
    assert images_per_s(times, batch=4, devices=1) == 2 and images_per_s(times, batch=4, devices=8) == 16
    assert images_per_s(Times(0.0, 1.0), batch=4, devices=8) == pytest.approx(BATCH)
    measured = dict(zip(MODELS, (Times(10.0, 0.0), Times(4.0, 0.0), Times(2.0, 0.0)), strict=True))
    found = rows("large", measured, batch=10, devices=1)
    assert [row["faster_by"] for row in found] == [1, 2.5, 5]
    assert found[0]["hours"] == pytest.approx(800 * 1_281_167 / 3600)
    assert [row["paper_hours"] for row in found] == list(PAPER_HOURS["large"])
    assert found[1]["paper_faster_by"] == pytest.approx(2.8, abs=0.05)


def test_the_three_models_share_the_memory_of_one() -> None:
    models, optimizer = build_shared_models(TINY, torch.device("cpu"))
    first, *others = models.values()
    addresses = {name: parameter.data_ptr() for name, parameter in first.named_parameters()}
    for model in others:
        shared = {name: parameter for name, parameter in model.named_parameters() if name != "mask_token"}
        assert all(parameter.data_ptr() == addresses[name] for name, parameter in shared.items())
    assert len(list(others[1].decoder_blocks.children())) == 1
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert all(id(parameter) in known for model in models.values() for parameter in model.parameters())


@pytest.mark.parametrize(("size", "hours"), [("large", "42.4"), ("huge", "119.6")])
def test_the_command_prints_our_figures_and_the_paper_s(
    size: str, hours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, size, TINY)
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--size", size, "--rounds", "1", "--devices", "8", "--json", str(tmp_path / "t.json")]
    assert run("table2", options) == 0
    printed = capsys.readouterr().out
    assert "8 x" in printed and hours in printed and "without, decoder 1" in printed
    assert [row["model"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]] == list(MODELS)


def test_a_size_that_does_not_fit_and_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table2_times, "free_bytes", lambda device: 10**9)
    assert run("table2", ["--size", "huge"]) == 2
    assert "--size huge needs 10.5 GB" in capsys.readouterr().err
    assert run("table2", ["--devices", "0"]) == 2
    assert "--devices" in capsys.readouterr().err
    assert run("table2", ["--json", str(tmp_path / "no" / "t.json")]) == 2
    assert "no folder" in capsys.readouterr().err
