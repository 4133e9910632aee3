"""Pre-training on a stream: it stops, resumes at a shard, and reports invalid settings in one line."""

from pathlib import Path

import pytest

from maelstream.jobs.command import run
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import Dataset
from tests.conftest import TINY
from tests.helpers.forked import run_ranks
from tests.pipeline.test_stream import pattern


def test_a_run_on_a_stream_stops_and_resumes(
    packed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = tmp_path / "stream.yaml", RunFolder(tmp_path / "run")
    urls = f"pipe:cat {packed.folder}/{pattern(packed)}"
    recipe.write_text(TINY + f"data: {{stream: {{urls: '{urls}', samples: 60, shuffle_buffer: 8}}}}\n")
    for more in (["--stop-at-step", "4"], ["--stop-at-step", "7"]):
        run_ranks(2, str(recipe), "--run", str(folder.path), *more, output=tmp_path / "output")
    steps = folder.read_metrics()
    assert [line["step"] for line in steps] == list(range(1, 8)) and steps[-1]["epoch"] == pytest.approx(84 / 60)
    assert run("reconstruct", [str(folder.path)]) == 2
    assert "reads a stream" in capsys.readouterr().err
    assert run("reconstruct", [str(folder.path), "--dataset", packed.folder, "--count", "2"]) == 0


@pytest.mark.parametrize(
    ("stream", "complaint"),
    [
        ("urls: a.tar", "samples is how many its shards hold"),
        ("urls: a.tar, samples: 60}, shuffle: block, mix: {", "a stream cannot be shuffled by blocks"),
    ],
)
def test_an_invalid_stream_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: str, complaint: str
) -> None:
    (tmp_path / "stream.yaml").write_text(TINY + f"data: {{stream: {{{stream}}}}}\n")
    assert run("pretrain", [str(tmp_path / "stream.yaml"), "--run", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1
