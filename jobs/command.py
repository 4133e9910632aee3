"""`maelstream COMMAND ...`: finds the command's module, and turns a user's mistake into one line and exit code 2."""

import importlib
import os
import sys

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported
from maelstream.shards.errors import MaelstreamError

# One line each for `maelstream --help`; a command's module is imported only when it runs, because torch,
# DALI and DeepSpeed take seconds to import and `maelstream info` needs none of them.
COMMANDS = {
    "pack": "images -> tar shards, an index and their side files",
    "index": "adopt tar shards that stand already, without changing them",
    "info": "what a packed dataset holds",
    "verify": "every fault of a packed dataset, by shard and sample",
    "loader": "how fast a packed dataset streams, what is the limit, what the model will see",
    "profile": "how fast each stage of a run goes alone, which one holds it back, and what to change",
    "table2": "the paper's table 2 on this machine, and the hours of its 800 epochs",
    "fit-pca": 'the components of the target "pca", from a dataset\'s patches',
    "fit-tokenizer": 'train the discrete VAE whose codes the target "token" asks for',
    "plan": "memory, speed, hours and the bound of a run, on hardware that need not be at hand",
    "tune": "the fastest engine and loader settings for a recipe on this machine, as a file laid over it",
    "pretrain": "train a masked autoencoder from a recipe, or go on with a run",
    "finetune": "train a classifier on a pre-trained encoder, all of it",
    "linprobe": "train a linear classifier on a frozen encoder, with several learning rates in one pass",
    "partial": "train the last blocks of an encoder and a classifier",
    "scratch": "train the same classifier without pre-training",
    "evaluate": "top-1 and top-5 of a trained classifier over every image of a packed dataset",
    "knn": "top-1 and top-5 of the nearest neighbours of an encoder's features; nothing is trained",
    "launch": "pretrain on many ranks, here or on many hosts; starts them again after a failure",
    "sweep": "a table of runs and their evaluations, over grids and seeds; printed and plotted as the paper does",
    "runs": "the runs of a folder and how they stand",
    "watch": "a run that is going on, from another terminal",
    "reconstruct": "original, masked and reconstructed images of a run at several mask ratios, side by side",
    "export": "a run's weights for the reference's code, for timm or for Hugging Face, with a model card",
    "report": "one HTML page of a run: curves, reconstructions, evaluations and all else; or of several, compared",
    "demo": "all of it on a small scale: pack, pre-train on two ranks, resume, look",
}


def run(command: str, args: list[str]) -> int:
    """Exit code of `command`: its own, or with one line on stderr that of a `MaelstreamError`: 2, if the user erred."""
    args = [arg for arg in args if not arg.startswith(("--local_rank=", "--local-rank="))]  # deepspeed adds it
    try:
        return importlib.import_module(f"maelstream.jobs.{command.replace('-', '_')}").main(args)
    except MaelstreamError as error:
        if os.environ.get("RANK", "0") == "0" or not error.found_by_all:
            print(f"maelstream {command}: {error}", file=sys.stderr)
        return error.exit_code


def main() -> None:
    """Entry point of the `maelstream` script."""
    command, *args = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        sys.exit(run(command, args))
    listing = "\n".join(f"  {name:<14} {line}" for name, line in COMMANDS.items())
    usage = f"usage: maelstream COMMAND ...\n\n{listing}\n\n`maelstream COMMAND --help` tells its options."
    if command in ("-h", "--help"):
        print(usage)
        sys.exit(0)
    print(f"maelstream: no command {command!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
