"""A full disk or a reader that has gone is silence or one line, never a traceback; no terminal is without letters."""

import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "maelstream.jobs.command"]
PRINTS = "from maelstream.jobs import output; import sys; output.guard_output(sys.argv[1]); print('a\\u2500b');"


def python(command: str, rest: str, stdout: int, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS + rest, command],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )
    return done.returncode, done.stderr.decode()


@pytest.fixture
def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.fixture
def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["runs", "tests"]])
def test_commands_that_print_end_with_one_line_on_a_full_disk_and_silently_without_a_reader(
    args: list[str], full: int, closed_pipe: int
) -> None:
    done = subprocess.run([*COMMAND, *args], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "maelstream: stdout cannot be written (No space left on device)\n")
    done = subprocess.run([*COMMAND, *args], stdout=closed_pipe, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0 and done.stderr == ""


def test_training_goes_on_without_its_output(full: int, closed_pipe: int) -> None:
    rest = "sys.stdout.flush(); print('more', flush=True); sys.stdout.flush(); sys.exit(7)"
    line = "maelstream: stdout cannot be written (No space left on device); going on without it\n"
    assert python("pretrain", rest, full) == (7, line)
    assert python("pretrain", rest, closed_pipe) == (7, "")


def test_an_ascii_terminal_gets_question_marks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS, "info"], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a?b\n", b"")


def test_too_little_memory_for_an_import_is_one_line() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29));"
    start = "import sys; sys.argv[1:] = ['profile', 'nowhere.yaml']; from maelstream.jobs import command;"
    broken = (
        "command.dispatch = lambda args: (_ for _ in ()).throw(ImportError('libtorch.so: failed to map segment from "
        "shared object')); command.main()"
    )
    done = subprocess.run([sys.executable, "-c", limit + start + broken], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "maelstream: not enough memory (libtorch.so" in done.stderr
