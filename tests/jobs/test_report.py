"""`maelstream report`: the content of the page, that it loads nothing, and the comparison of several runs."""

import json
import math
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from maelstream.jobs import reporting
from maelstream.jobs.command import run
from maelstream.jobs.evaluation.results import Evaluation, record
from maelstream.jobs.recipe import ClassificationRecipe, LabelledData, dump_recipe
from maelstream.jobs.reporting.curves import available_charts, curve_points, downsampled
from maelstream.jobs.reporting.reconstruction_files import ReconstructionInfo, write_reconstructions
from maelstream.jobs.reporting.report_images import image_series
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import Dataset
from tests.helpers.reported import make_run, reconstruction


class Page(HTMLParser):
    """The addresses, ids, text and JSON of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text, self.data, self._in = "", "", ""
        self.feed(path.read_text())
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = "data" if dict(attrs).get("id") == "data" else tag
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data") and value is not None:
                self.addresses.append(value)
            if name == "id" and value is not None:
                self.ids.append(value)

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "data":
            self.data += data
        elif self._in not in ("script", "style"):
            self.text += f"{data} "


@pytest.fixture(scope="module")
def reported(packed: Dataset, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = make_run(tmp_path_factory.mktemp("reported") / "one", tiny)
    assert run("report", [str(folder.path)]) == 0
    return folder


def test_a_page_loads_nothing_from_outside(reported: RunFolder) -> None:
    page = Page(reported.path / "report.html")
    assert page.addresses and all(address.startswith(("#", "data:")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    for name in ("report.css", "report.js"):
        text = (Path(reporting.__path__[0]) / "page" / name).read_text()
        assert "url(" not in text and "@import" not in text and "fetch(" not in text and "import(" not in text


def test_a_page_describes_the_run_and_its_state(reported: RunFolder, packed: Dataset) -> None:
    text = Page(reported.path / "report.html").text
    for part in (
        "stopped: SIGTERM",
        "model.dim 48 768",  # this run, default
        "linprobe 41.20 % 71.20 % 20 147 10,000",
        f"location {packed.folder}",
        "a.tar: 000000007 not a JPEG",  # a replaced sample
        "weights.safetensors has 3 bytes instead of 4",  # a damaged checkpoint
        "Python ",
        "maelstream pretrain tiny.yaml",
        "mean and variance",  # the note on the normalised target
    ):
        assert part in text, part


def test_a_page_holds_every_curve_and_every_image(reported: RunFolder) -> None:
    data = json.loads(Page(reported.path / "report.html").data)
    loss = data["runs"][0]["curves"]["loss"]
    metrics = reported.read_metrics()
    assert loss["step"] == [line["step"] for line in metrics] and loss["value"] == [line["loss"] for line in metrics]
    assert None in loss["value"] and data["runs"][0]["events"]["step"] == [15]
    own, others = data["series"]
    assert [entry["label"] for entry in own["entries"]] == ["0.8 (step 4)", "1.6 (step 8)", "2.4 (step 12)"]
    assert own["ratios"] == [0.75, 0.85] and own["tiny"] and len(others["entries"]) == 1
    sources = [file["src"] for entry in own["entries"] for file in entry["files"].values()]
    assert len(set(sources)) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)


def test_images_of_the_command_are_a_series_of_their_own(tiny: str, tmp_path: Path) -> None:
    """Before, they replaced the run's own at the newest step, and its slider jumped to other images."""
    folder = make_run(tmp_path / "run", tiny)
    info = ReconstructionInfo.describe(
        {"0.75": reconstruction(3, 0.9)}, "step-00000012", 12, "own", ("c", "d", "e"), "pixel"
    )
    write_reconstructions(folder.reconstructions / "step-00000012-own", {"0.75": reconstruction(3, 0.9)}, info)
    same = ReconstructionInfo.describe({"0.5": reconstruction(2, 0.9)}, "step-00000012", 12, "own", ("a", "b"), "pixel")
    write_reconstructions(folder.reconstructions / "step-00000012-other", {"0.5": reconstruction(2, 0.9)}, same)
    own, *others = image_series(folder, None)
    assert [entry["label"] for entry in own.entries] == ["step 4", "step 8", "step 12"]
    assert own.images == "From the top: a, b of own" and own.ratios == [0.75, 0.85]
    assert {one.images for one in others} >= {"From the top: c, d, e of own", "From the top: a, b of own"}
    assert all(len(one.entries) == 1 for one in others)


def test_markup_in_names_and_metrics_stays_text(tiny: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>&run", tiny)
    with folder.metrics.open("a") as file:
        line = folder.read_metrics()[-1] | {"step": 41, "</script><script>alert(1)</script>": 1.0}
        file.write(json.dumps(line) + "\n")
    assert run("report", [str(folder.path), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in text and "<b>&run" not in text and "&lt;b&gt;&amp;run" in text


def test_verify_finds_a_changed_byte_that_sizes_do_not_show(tiny: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tiny)
    weights = folder.checkpoints.at(8) / "weights.safetensors"
    weights.write_bytes(b"bad!")
    for options, expected in (([], "sizes match"), (["--verify"], "weights.safetensors is damaged")):
        assert run("report", [str(folder.path), *options]) == 0
        assert expected in Page(folder.path / "report.html").text


def test_several_runs_are_compared(reported: RunFolder, tiny: str, tmp_path: Path) -> None:
    other = make_run(tmp_path / "two", tiny)
    other.config.write_text(other.config.read_text().replace("decoder_depth: 1", "decoder_depth: 2"))
    record(evaluation(tmp_path / "probe", top1=50.0), other.path)
    out = tmp_path / "page.html"
    assert run("report", [str(reported.path), str(other.path), "--out", str(out)]) == 0
    page = Page(out)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert [one["name"] for one in json.loads(page.data)["runs"]] == [str(reported.path), str(other.path)]
    assert "model.decoder_depth 1 2" in page.text and "model.dim" not in page.text
    assert "41.20 %" in page.text and "50.00 %" in page.text
    assert '<td class="number best">50.00 %' in out.read_text() and '<td class="number best">41' not in out.read_text()


def test_what_is_no_run_among_several_folders_is_left_out_with_a_line(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SWEEP/* names the sweep's recipes and its table, too."""
    runs = [make_run(tmp_path / name, tiny).path for name in ("a", "z")]
    (tmp_path / "recipes").mkdir()
    (tmp_path / "table.md").write_text("")
    assert run("report", list(map(str, sorted(tmp_path.iterdir())))) == 0
    printed = capsys.readouterr().err.splitlines()
    assert [line.split(" is not a run")[0].rpartition("/")[2] for line in printed] == ["recipes", "table.md"]
    names = [one["name"] for one in json.loads(Page(tmp_path / "compare.html").data)["runs"]]
    assert names == [str(path) for path in runs]
    assert run("report", [str(tmp_path / "recipes"), str(tmp_path / "table.md")]) == 2
    assert "none of the 2 folders is a run" in capsys.readouterr().err
    assert run("report", [str(runs[0]), str(tmp_path / "table.md")]) == 0  # one run is left: its own page
    assert (runs[0] / "report.html").exists()


def evaluation(folder: Path, top1: float) -> Evaluation:
    known: dict[str, Any] = {
        "job": "linprobe",
        "name": "linprobe",
        "top1": top1,
        "top5": 80.0,
        "images": 100,
        "step": 4,
    }
    known |= {"epochs": 20.0, "weights": "run", "train": "t", "val": "v", "settings": {"lr": 0.1}, "finished": 1.0}
    return Evaluation(folder=str(folder), **known)


def test_several_heads_are_listed_with_their_top1(tiny: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tiny)
    heads = {"lr 0.1": {"top1": 40.0, "top5": 80.0}, "lr 0.2": {"top1": 39.5, "top5": 79.0}}
    settings = {"batch_size": 64, "blocks": -1.0, "best": "lr 0.1", "all": heads, "undecodable": ["a: cut", "b: cut"]}
    one = replace(evaluation(tmp_path / "probe", top1=40.0), settings=settings)
    record(one, folder.path)
    assert run("report", [str(folder.path)]) == 0
    expected = "batch size 64, best lr 0.1, lr 0.1: 40.00 %, lr 0.2: 39.50 %, 2 images undecodable"
    assert expected in Page(folder.path / "report.html").text


def test_the_report_of_a_classification_run_has_both_datasets(packed: Dataset, tiny: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tiny)
    recipe = ClassificationRecipe(job="linprobe", data=LabelledData(train=packed.folder, val="gone"))
    folder.config.write_text(dump_recipe(recipe))
    assert run("report", [str(folder.path)]) == 0
    text = Page(folder.path / "report.html").text
    assert "job linprobe finetune" in text and f"location {packed.folder}" in text
    assert "gone is not a packed dataset" in text


def test_a_missing_dataset_is_reported(tiny: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tiny)
    recipe = folder.config.read_text().splitlines()
    folder.config.write_text("\n".join("  dataset: gone" if "  dataset:" in line else line for line in recipe))
    assert run("report", [str(folder.path)]) == 0
    assert "The dataset cannot be opened now: gone is not a packed dataset" in Page(folder.path / "report.html").text


def test_bad_input_is_a_one_line_error(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", tiny)
    (folder.reconstructions / "step-00000004" / "ratio-0.75.png").write_bytes(b"not an image")
    assert run("report", [str(folder.path)]) == 2
    assert "ratio-0.75.png cannot be read" in capsys.readouterr().err
    shutil.rmtree(folder.reconstructions)
    assert run("report", [str(folder.path), "--out", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    folder.metrics.write_text("")
    assert run("report", [str(folder.path)]) == 2
    err = capsys.readouterr().err
    assert "has logged no step yet" in err and err.count("\n") == 1


def test_a_long_curve_keeps_its_ends_and_its_peaks() -> None:
    values: list[float | None] = [math.sin(n / 900) for n in range(20_000)]
    values[7000], values[13_000], values[50] = 99.0, -99.0, None
    chosen = downsampled(values, 1000)
    assert chosen == sorted(set(chosen)) and len(chosen) <= 1002
    assert {0, 7000, 13_000, 19_999} <= set(chosen)
    assert downsampled(values[:1000], 1000) == list(range(1000))
    assert downsampled([None] * 3000, 1000)


def test_unknown_metrics_get_their_own_charts() -> None:
    metrics = [{"step": 1, "epoch": 0.1, "loss": None, "lr": 0.1, "top1_of_lr_0.1": 3.0, "skipped": 0, "spike": False}]
    assert [chart.name for chart in available_charts([metrics])] == ["lr", "top1_of_lr_0.1"]
    assert curve_points(metrics)["lr"]["value"] == [0.1]


def test_a_long_series_keeps_24_evenly_spaced_entries(tiny: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tiny)
    first = folder.reconstructions / "step-00000004"
    for step in range(13, 60):
        copy = shutil.copytree(first, folder.reconstructions / f"step-{step:08d}")
        about = json.loads((copy / "about.json").read_text())
        (copy / "about.json").write_text(json.dumps(about | {"step": step}))
    (series, _) = image_series(folder, None)
    assert len(series.entries) == 24 and series.left_out == 50 - 24
    assert (series.entries[0]["label"], series.entries[-1]["label"]) == ("step 4", "step 59")


def test_large_images_are_compressed_and_smoothed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    results = {"0.75": reconstruction(2, 0.4, side=128)}
    info = ReconstructionInfo.describe(results, "step-00000004", 4, "own", ("a", "b"), "pixel")
    write_reconstructions(folder.reconstructions / "step-00000004", results, info)
    (series,) = image_series(folder, 0.25)
    assert not series.tiny and series.note == "" and series.entries[0]["label"] == "1 (step 4)"
    assert series.entries[0]["files"]["0.75"]["src"].startswith("data:image/webp;base64,")


def test_the_script_is_valid_javascript() -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    script = Path(reporting.__path__[0]) / "page" / "report.js"
    checked = subprocess.run([node, "--check", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
