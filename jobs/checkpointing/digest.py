"""Size and SHA-256 of the files of a checkpoint. This module imports no torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 24
"""Bytes hashed and written at once; other threads run during both."""


@dataclass(frozen=True)
class Digest:
    """Size and SHA-256 that a file must have."""

    bytes: int
    sha256: str


def digest_of(path: Path) -> Digest:
    """Size and SHA-256 of a file that is on the disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Digest(size, digest.hexdigest())
