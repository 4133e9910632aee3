"""Imports run downwards only, between rooms and sub-rooms of jobs/ (docs/design.md); no console reads markup."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "shards": set(),
    "model": set(),
    "pipeline": {"shards"},
    "jobs": {"shards", "pipeline", "model"},
}
JOBS = (
    # Modules that every part of jobs/ may import.
    *("arguments", "yaml_files", "recipe_schema", "recipe", "hardware", "format", "output"),
    *("distributed", "checkpointing", "run_folder", "training", "weights", "evaluation", "reporting", "profiling"),
    *("packing", "sweeps", "command"),  # command.py dispatches; only commands import it
)
"""From the ground up: each imports only itself and what comes before it. All other modules of jobs/ are commands."""
MODULES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))
COMMANDS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.stem not in (*JOBS, "__init__"))


def imported_modules(source: str) -> set[tuple[str, ...]]:
    """The modules of maelstream, tests and benchmarks that a source file imports: ("jobs", "training", "step")."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = (tuple(name.split(".")) for name in names)
    return {name[1:] if name[0] == "maelstream" else name for name in parts if name[0] in OWN}


OWN = ("maelstream", "tests", "benchmarks", *MAY_IMPORT)


def imports_upwards(path: Path, source: str) -> list[str]:
    """Imports of a module of jobs/ that go to a command or to a later sub-room."""
    own = path.relative_to(ROOT / "jobs").parts[0].removesuffix(".py")
    level = JOBS.index(own) if own in JOBS else len(JOBS)
    wrong = []
    for name in imported_modules(source):
        if name[0] == "jobs" and len(name) > 1 and name[1] != own:
            target = JOBS.index(name[1]) if name[1] in JOBS else len(JOBS)
            if target >= level:
                wrong.append(".".join(name))
    return wrong


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    source = path.read_text()
    assert {name[0] for name in imported_modules(source)} <= MAY_IMPORT[room] | {room}
    tops = {alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names}
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    own_names = {str(name).split(".")[0] for name in tops | modules} & set(MAY_IMPORT)
    assert not own_names, "a user's own model.py or jobs.py would be imported; import maelstream.<room>"


@pytest.mark.parametrize("path", [path for path in MODULES if path.is_relative_to(ROOT / "jobs")], ids=ids)
def test_a_part_of_jobs_imports_only_the_parts_below_it_and_no_command(path: Path) -> None:
    assert imports_upwards(path, path.read_text()) == []


def test_every_sub_room_is_in_the_order() -> None:
    assert {path.name for path in (ROOT / "jobs").iterdir() if (path / "__init__.py").exists()} <= set(JOBS)


def test_upward_imports_are_found() -> None:
    source = "def f():\n    from maelstream.jobs.training.engine import build_engine\n"
    assert imported_modules(source) == {("jobs", "training", "engine", "build_engine")}
    assert imports_upwards(ROOT / "jobs/weights/reading.py", source) == []
    assert imports_upwards(ROOT / "jobs/distributed/ranks.py", source) == ["jobs.training.engine.build_engine"]
    command = "from maelstream.jobs.pretrain import main\n"
    assert imports_upwards(ROOT / "jobs/profile.py", command) == ["jobs.pretrain.main"]
    assert imports_upwards(ROOT / "jobs/recipe.py", command) == ["jobs.pretrain.main"]


@pytest.mark.parametrize("room", ["shards", "model"])
def test_shards_import_no_tensor_library_and_the_model_no_file_library(room: str) -> None:
    foreign = {"shards": {"torch", "timm", "nvidia"}, "model": {"pyarrow", "webdataset", "nvidia", "deepspeed"}}[room]
    for path in (ROOT / room).rglob("*.py"):
        tree = ast.parse(path.read_text())
        # DALI proves odd images at packing; it is imported when the first of them comes.
        nodes = tree.body if path.name == "dali_proof.py" else ast.walk(tree)
        names = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not {name.split(".")[0] for name in names} & foreign, path


def imported_packages(folder: str) -> set[str]:
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {*OWN, "no_such_package"}


@pytest.mark.parametrize("folder", ["shards", "pipeline", "model", "jobs", "benchmarks", "tests"])
def test_every_package_that_the_code_imports_is_declared(folder: str) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in extras.values() for text in extra)]
    declared = {canonical(re.split(r"[<>=\[; ]", text)[0]) for text in texts}
    providers = packages_distributions()
    for name in imported_packages(folder) - {"spdl", "grain"}:  # peers of `make bench`, seldom installed
        assert {canonical(provider) for provider in providers[name]} & declared, f"{name} is not in pyproject.toml"


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").rglob("*.py")), ids=lambda path: path.stem)
def test_a_console_prints_names_from_data_as_they_are(path: Path) -> None:
    """rich would read `[red]` in the name of a class, a file or a run as markup, and `:smile:` as a picture."""
    tree = ast.parse(path.read_text())
    only_measured = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "width"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
            off = {
                word.arg for word in node.keywords if isinstance(word.value, ast.Constant) and word.value.value is False
            }
            assert id(node) in only_measured or off >= {"markup", "emoji"}, f"{path}, line {node.lineno}"
