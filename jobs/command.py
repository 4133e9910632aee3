"""`maelstream COMMAND ...`: runs the command's module; an error of the user becomes one line and exit code 2."""

from maelstream.jobs.distributed.ctrl_c import handle_ctrl_c, report_ctrl_c  # first: importing it sets it up

# isort: split
import maelstream.jobs.distributed.parent_death  # noqa: F401  must come before slow imports

# isort: split
import importlib
import os
import sys

from maelstream.jobs.output import flush_output, guard_output, stdout_failed
from maelstream.shards.errors import MaelstreamError

# One line per command for `maelstream --help`. A command's module is imported only when it runs, because torch, DALI
# and DeepSpeed take seconds to import, and commands such as `maelstream info` do not need them.
COMMANDS = {
    "pack": "pack images into tar shards with an index",
    "index": "index existing tar shards without changing them",
    "info": "show what a packed dataset contains",
    "verify": "list every fault of a packed dataset by shard and sample",
    "loader": "measure how fast a packed dataset loads and what limits it; show the images that the model gets",
    "profile": "measure each stage of a run alone, and report the bottleneck and what to change",
    "table2": "measure the paper's table 2 on this machine, with the hours of 800 epochs",
    "fit-pca": 'compute the components of the target "pca" from the patches of a dataset',
    "fit-tokenizer": 'train the discrete VAE whose codes the target "token" predicts',
    "plan": "predict memory, speed, hours and the bottleneck of a run on other hardware",
    "tune": "search for the fastest engine and loader settings on this machine, and write them as a recipe",
    "pretrain": "pre-train a masked autoencoder from a recipe, or resume a run",
    "finetune": "train a classifier and its pre-trained encoder",
    "linprobe": "train linear classifiers on a frozen encoder, with several learning rates in one pass",
    "partial": "train a classifier and the last blocks of its pre-trained encoder",
    "scratch": "train a classifier without pre-training",
    "evaluate": "compute top-1 and top-5 of a trained classifier on a packed dataset",
    "knn": "compute top-1 and top-5 of nearest neighbours in an encoder's features; nothing is trained",
    "launch": "start a training command on many ranks, on one or many hosts; restart them after a failure",
    "sweep": "train and evaluate over grids and seeds, and print and plot the paper's table",
    "runs": "list the runs of a folder and their state",
    "watch": "show the progress of a run in another terminal",
    "reconstruct": "show original, masked and reconstructed images at several mask ratios",
    "export": "export weights for the reference's code, timm or Hugging Face, with a model card",
    "report": "write one HTML page about a run, or a comparison of several runs",
    "demo": "run everything at a small scale: pack, pre-train on two ranks, resume, report",
}


def run(command: str, args: list[str]) -> int:
    """Runs `command` and returns its exit code.

    A `MaelstreamError` prints one line on stderr; its exit code is 2 if the user can correct the error.
    """
    args = [arg for arg in args if not arg.startswith(("--local_rank=", "--local-rank="))]  # deepspeed adds it
    try:
        return importlib.import_module(f"maelstream.jobs.{command.replace('-', '_')}").main(args)
    except MaelstreamError as error:
        if os.environ.get("RANK", "0") == "0" or not error.found_by_all:
            print(f"maelstream {command}: {error}", file=sys.stderr)
        return error.exit_code


def main() -> None:
    """Entry point of the script `maelstream`."""
    handle_ctrl_c()
    guard_output(sys.argv[1] if len(sys.argv) > 1 else "")
    try:
        code = dispatch(sys.argv[1:])
        flush_output()
    except KeyboardInterrupt:
        report_ctrl_c()
        code = 130
    except OSError as error:
        if not stdout_failed():
            raise
        if not isinstance(error, BrokenPipeError):
            print(f"maelstream: stdout cannot be written ({error.strerror})", file=sys.stderr)
        code = 2
    except (ImportError, MemoryError) as error:
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        print(f"maelstream: not enough memory ({error}); see `ulimit -v` and `free -g`", file=sys.stderr)
        code = 2
    sys.exit(code)


def dispatch(args: list[str]) -> int:
    """Runs the command that `args` begin with, or prints help or the version; returns the exit code."""
    command, *rest = args or ["--help"]
    if command in COMMANDS:
        return run(command, rest)
    if command == "help" and rest and rest[0] in COMMANDS:
        return run(rest[0], ["--help"])
    if command in ("-h", "--help") or args == ["help"]:
        listing = "\n".join(f"  {name:<14} {line}" for name, line in COMMANDS.items())
        print(f"usage: maelstream COMMAND ...\n\n{listing}\n\n`maelstream COMMAND --help` lists its options.")
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"maelstream {version('maelstream')}")
        return 0
    import difflib

    wanted = rest[0] if command == "help" else command
    near = difflib.get_close_matches(wanted, COMMANDS, 1)
    nearest = f"did you mean {near[0]}? The others are" if near else "one of"
    print(
        f"maelstream: no command {wanted!r}; {nearest} {', '.join(c for c in COMMANDS if c not in near)}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    main()
