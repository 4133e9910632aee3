"""CPU time of every command until its help or its first error is printed: `python -m benchmarks.startup [COMMAND ...]`.

Each is a process of its own, in an empty folder; the figure is the least user + system time of `ROUNDS` processes and
their children. Prints the table of docs/measured/startup.md.
"""

import resource
import subprocess
import sys
import tempfile

from maelstream.jobs.command import COMMANDS

ROUNDS = 3
READING = ("runs", "watch", "info", "plan", "report", "index", "verify")
LIMIT_S = {True: 0.5, False: 3.0}
"""Limit for commands that only read files, and for the others."""

# Arguments with one mistake that a user may make: in most cases a name that does not exist.
MISTAKES = {
    "pack": ["nowhere", "packed"],
    "index": ["nowhere"],
    "info": ["nowhere"],
    "verify": ["nowhere"],
    "loader": ["nowhere"],
    "profile": ["nowhere.yaml"],
    "table2": ["--size", "tiny"],
    "fit-pca": ["nowhere", "--out", "pca.safetensors"],
    "fit-tokenizer": ["nowhere", "--out", "tokenizer.safetensors"],
    "plan": ["--gpu", "v1"],
    "tune": ["nowhere.yaml"],
    "pretrain": ["nowhere.yaml"],
    "finetune": ["nowhere", "train", "val"],
    "linprobe": ["nowhere", "train", "val"],
    "partial": ["nowhere", "train", "val"],
    "scratch": ["train", "val"],
    "evaluate": ["nowhere", "val"],
    "knn": ["nowhere", "train", "val"],
    "launch": ["nowhere"],
    "sweep": ["nowhere.yaml", "--dir", "runs"],
    "runs": ["nowhere"],
    "watch": ["nowhere"],
    "reconstruct": ["nowhere"],
    "export": ["nowhere"],
    "report": ["nowhere"],
    "demo": ["--src", "nowhere"],
}


def cpu_s(arguments: list[str], code: int) -> float:
    """The least CPU time in seconds of `maelstream ARGUMENTS`, which must end with the exit code `code`."""
    figures = []
    for _ in range(ROUNDS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as empty:
            command = [sys.executable, "-m", "maelstream.jobs.command", *arguments]
            done = subprocess.run(command, cwd=empty, capture_output=True, text=True)
        if done.returncode != code:
            raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}, not {code}: {done.stderr}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        figures.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(figures)


def main() -> int:
    """Prints one row per command; returns 1 if a figure is above its limit."""
    above = False
    print("| command | `--help`, s | first error, s | of | limit, s |\n|---|---|---|---|---|")
    for command in sys.argv[1:] or COMMANDS:
        mistake, limit_s = MISTAKES[command], LIMIT_S[command in READING]
        help_s, error_s = cpu_s([command, "--help"], 0), cpu_s([command, *mistake], 2)
        print(
            f"| {command} | {help_s:.2f} | {error_s:.2f} | `{' '.join((command, *mistake))}` | {limit_s} |", flush=True
        )
        above |= max(help_s, error_s) > limit_s
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
