"""`maelstream info` prints names of the data as they are, also where rich would read them as markup."""

import json
from pathlib import Path

import pytest

from maelstream.jobs.command import run
from tests.conftest import write_images


def test_names_in_square_brackets_are_text_and_damaged_lines_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "src", classes=1, per_class=2)
    (images / "class00" / "[red]a[b].jpg").write_bytes(b"no image")
    assert run("pack", [str(images), str(tmp_path / "out"), "--workers", "1"]) == 0
    lines = (tmp_path / "out" / "quarantine.jsonl").read_bytes()
    markup = json.dumps({"source": "x", "reason": "[/b] is no class"}).encode()
    (tmp_path / "out" / "quarantine.jsonl").write_bytes(lines + markup + b"\n\xff\n[]\n")
    capsys.readouterr()
    assert run("info", [str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "[red]a[b].jpg" in printed and "[/b] is no class" in printed and "unreadable" in printed
