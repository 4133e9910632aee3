"""`maelstream` itself: help, the version, mistyped commands, and Ctrl-C in every phase."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

from maelstream.jobs.command import COMMANDS, dispatch


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["help"], []])
def test_help_lists_every_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(args) == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in COMMANDS.values())


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dispatch(["help", "info"])
    assert ended.value.code == 0 and "usage: maelstream info" in capsys.readouterr().out


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


@pytest.mark.parametrize("after_s", [0.3, 1.0, 2.0])
def test_ctrl_c_while_a_command_starts_is_one_line(after_s: float) -> None:
    """The command imports torch, DALI and DeepSpeed for some seconds."""
    code = "import sys; from maelstream.jobs.command import main; sys.argv[1:] = ['finetune', 'nowhere']; "
    code += "print('started', flush=True); main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(after_s)
    os.kill(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    if after_s < 0.5 or process.returncode != 2:  # otherwise it may have ended by itself
        assert process.returncode == 130, printed
        assert "Traceback" not in printed and printed.strip().splitlines()[-1] == "maelstream: stopped by Ctrl-C"
