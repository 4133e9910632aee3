"""The house keeps its shape: an import runs downwards only (docs/design.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "shards": set(),
    "model": set(),
    "pipeline": {"shards"},
    "jobs": {"shards", "pipeline", "model"},
}
MODULES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def imported_rooms(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    assert not any(name.startswith(".") for name in names), "imports are absolute"
    return {name.split(".")[0] for name in names} & (MAY_IMPORT.keys() | {"tests", "benchmarks"})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert imported_rooms(path.read_text()) <= MAY_IMPORT[room] | {room}


def test_an_upward_import_would_be_found() -> None:
    assert imported_rooms("def f():\n    from maelstream.jobs.training.engine import build_engine\n") == {"jobs"}


@pytest.mark.parametrize("room", ["shards", "model"])
def test_bytes_know_no_tensors_and_tensors_know_no_files(room: str) -> None:
    foreign = {"shards": {"torch", "timm", "nvidia"}, "model": {"pyarrow", "webdataset", "nvidia", "deepspeed"}}[room]
    for path in (ROOT / room).rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not {name.split(".")[0] for name in names} & foreign, path
