"""The options of `maelstream fit-tokenizer`, without torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class FitTokenizer:
    """Train the discrete VAE whose codes are predicted with the target "token"."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """A packed dataset; a folder, or a URI such as s3://bucket/folder."""
    out: Path
    """The file to write: FILE.safetensors."""
    recipe: Path | None = None
    """Recipe with crop, shuffle, seed and sizes; default: the paper's pre-training."""
    codes: int | None = None
    """Size of the codebook; default: that of the recipe (8192)."""
    hidden: int = 64
    """Channels of the first group of blocks; DALL-E's tokenizer has 256."""
    steps: int = 20_000
    """Training steps."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate, at the end of the warm-up."""
    log_every: int = 100
    """Steps per line of output."""
    threads: int = len(os.sched_getaffinity(0))
    """Number of threads that decode images."""
