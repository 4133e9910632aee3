"""`maelstream` itself: help, the version, mistyped commands, and Ctrl-C in every phase."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from maelstream.jobs.command import COMMANDS, dispatch, run


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["help"], []])
def test_help_lists_every_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(args) == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in COMMANDS.values())


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dispatch(["help", "info"])
    assert ended.value.code == 0 and "usage: maelstream info" in capsys.readouterr().out


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        run(args[0], [*args[1:], "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("pretrain",), ("[OPTIONS] RECIPE", "--optim.epochs FLOAT Length of the schedule", "(default: 800.0)")),
        (("pretrain", "pretrain_demo"), ("[OPTIONS] RECIPE", "(default: runs/pretrain_demo)")),
        (("profile",), ("[OPTIONS] RECIPE", "(default: 800.0)", "(default: profile.png)")),
        (("tune",), ("RECIPE The name or the YAML file of a pre-training recipe. (required)",)),
        (
            ("finetune",),
            ("WEIGHTS TRAIN VAL", "lr of a layer divided by the lr of the layer above it. (default: 0.65)"),
        ),
        (("linprobe",), ("after a BatchNorm. (default: True)", "(paper, tables 9 and 10). (default: lars)")),
        (("partial",), ("--blocks FLOAT, --tuning.blocks FLOAT Number of last blocks",)),
        (("scratch",), ("usage: maelstream scratch [-h] [OPTIONS] TRAIN VAL", "(default: 300.0)")),
        (("launch",), ("What every rank runs, with its arguments: pretrain, profile, finetune, linprobe, partial,",)),
    ],
)
def test_help_has_the_commands_own_defaults(
    args: tuple[str, ...],
    expected: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = help_of(capsys, monkeypatch, *args)
    for text in expected:
        assert text in printed
    assert printed.count("(required)") == {"tune": 1, "finetune": 3, "linprobe": 3, "partial": 3, "scratch": 2}.get(
        args[0], 0 if args[0] == "launch" else 1
    )


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["--version"]) == 0
    assert capsys.readouterr().out == f"maelstream {version('maelstream')}\n"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["pretrian", "x.yaml"], "no command 'pretrian'; did you mean pretrain? The others are pack, "),
        (["help", "reprot"], "no command 'reprot'; did you mean report? The others are pack, "),
        (["xyzzy"], "no command 'xyzzy'; one of pack, "),
    ],
)
def test_a_mistyped_command_gets_the_nearest_one(
    args: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(args) == 2
    printed = capsys.readouterr().err
    assert complaint in printed and printed.count("\n") == 1


@pytest.mark.parametrize("after_s", [0.05, 0.3, 1.0, 2.0])
def test_ctrl_c_while_a_command_starts_is_one_line(after_s: float, tmp_path: Path) -> None:
    """The command reads its recipe and imports torch, DALI and DeepSpeed for some seconds."""
    code = "import sys; from maelstream.jobs.command import main; sys.argv[1:] = ['pretrain', 'pretrain_demo']; "
    code += "print('started', flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(after_s)
    os.kill(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    if after_s < 0.5 or process.returncode != 2:  # otherwise it may have ended by itself
        assert process.returncode == 130, printed
        assert "Traceback" not in printed and printed.strip().splitlines()[-1] == "maelstream: stopped by Ctrl-C"


_IMPORTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    import json  # a place where Python runs the signal's handler
except BaseException:
    print("swallowed")  # numpy does this, and then imports itself until the stack is full
"""


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_ctrl_c_during_an_import_ends_the_process_although_a_package_catches_it(
    rank: str | None, lines: int, tmp_path: Path
) -> None:
    (tmp_path / "catches.py").write_text(_IMPORTED)
    code = "import maelstream.jobs.command as c; c.dispatch = lambda args: __import__('catches') and 0; c.main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)} | ({"RANK": rank} if rank else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 130 and "swallowed" not in done.stdout
    assert done.stderr.split("\n") == ["", *["maelstream: stopped by Ctrl-C"] * lines, *[""] * lines]


def test_ctrl_c_during_work_lets_the_command_clean_up() -> None:
    code = """
import os, signal, maelstream.jobs.command as command
def work(args):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    finally:
        print("cleaned up")
command.dispatch = work
command.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")
    assert done.stderr == "\nmaelstream: stopped by Ctrl-C\n"


def test_a_command_in_the_background_keeps_ignoring_ctrl_c() -> None:
    code = "import os, signal, maelstream.jobs.command as c; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    code += "c.dispatch = lambda args: os.kill(os.getpid(), signal.SIGINT) or 7; c.main()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 7
