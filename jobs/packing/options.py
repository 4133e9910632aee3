"""Command-line options that `maelstream pack` and `maelstream index` share."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import EXECUTORS, Executor
from maelstream.shards.labels import nfc
from maelstream.shards.layout import SPLITS

_NAME_LETTERS = 200  # of a shard's name, which may have 255 with its number and suffix


@dataclass(frozen=True)
class Labels:
    """Which images and labels are taken, and where class names come from."""

    image_field: str | None = None
    """Extension of the image in a sample (jpg, seg.png), or Parquet column. Default: the first of jpg, jpeg, png, webp,
    bmp, gif, tif and tiff, or the column that holds images."""
    label_field: str | None = None
    """Extension, JSON field or Parquet column that holds the label. Default: the sample's .cls file, or the first field
    named label, cls, class, class_id, target, labels or fine_label."""
    classes: Path | None = None
    """A text file of class names, one line per label, for sources whose labels are numbers."""
    labels: bool = True
    """Pack labels. Pre-training needs none: --no-labels also packs images whose label is missing or unreadable."""

    def names(self) -> list[str] | None:
        """Class names by label; DatasetError if the file cannot be read or names a class twice, or labels are off."""
        if not self.labels and (self.classes is not None or self.label_field is not None):
            raise DatasetError("--no-labels: omit --classes and --label-field, which are about labels")
        if self.classes is None:
            return None
        try:  # Windows begins a file with a byte order mark, and ends lines with \r\n, which read_text changes to \n
            lines = self.classes.read_text("utf-8-sig").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"--classes {self.classes} cannot be read ({error})") from None
        names = [nfc(line.strip()) for line in lines]
        if "" in names or len(set(names)) < len(names):
            number = next(n for n, name in enumerate(names) if not name or name in names[:n])
            raise DatasetError(
                f"--classes {self.classes}: write one class per line; no line may be empty or repeated, as line "
                f"{number + 1} ({names[number]}) is"
            )
        return names


@dataclass(frozen=True)
class Workers:
    """How many workers run, where, and what they do with unusable files."""

    workers: int = len(os.sched_getaffinity(0))
    """Number of processes, or of concurrent Ray tasks; each builds one shard at a time."""
    executor: Literal["local", "ray"] = "local"
    """local uses this machine; ray uses the cluster that RAY_ADDRESS names, or starts one here if it is not set."""
    strict: bool = False
    """Stop with an error at the first unusable file instead of listing it in quarantine.jsonl."""

    def make(self) -> Executor:
        """The executor; DatasetError for fewer than one worker."""
        return EXECUTORS[self.executor](self.workers)


def dataset_name(given: str | None, src: str, split: str) -> str:
    """The name `given`, or one derived from `src`; DatasetError if it or `split` cannot be part of a file name."""
    name = default_name(src) if given is None else given
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise DatasetError(
            f"--name {name}, --split {split}: use only letters, digits, _ and -, because both are part of file names"
        )
    if len(name) + len(split) > _NAME_LETTERS:
        raise DatasetError(
            f"--name {name[:40]}..., --split {split[:40]}: use at most {_NAME_LETTERS} letters in all, because "
            "both are part of file names"
        )
    return name


def default_name(src: str) -> str:
    """A dataset's name from its source: the last part of the path that is not a split (imagenet/train: imagenet)."""
    path = src.partition("?")[0] if "://" in src else os.path.abspath(src)
    words = set().union(*SPLITS.values())
    for part in reversed(path.split("/")):
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", re.split(r"[.{*?\[]", part)[0])
        name = re.sub(rf"[-_]({'|'.join(words)})$", "", name.strip("-_"))
        if name and name.lower() not in words | {"data"}:
            return name[:100]
    return "images"
