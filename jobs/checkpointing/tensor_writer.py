"""safetensors files of float32, written tensor by tensor and hashed on the way.

The library's own `save_file` wants every tensor at once and holds the interpreter while it writes; this one takes them
one after another, and a thread can run it while training goes on. The library reads what it writes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from maelstream.shards.durable import sync

_CHUNK = 1 << 24  # bytes hashed and written at once; both let other threads run meanwhile


@dataclass(frozen=True)
class Digest:
    """What a file must be."""

    bytes: int
    sha256: str


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor]) -> Digest:
    """Writes the float32 `tensors`, on the CPU and in the order of `shapes`, and syncs the file to the disk."""
    header: dict[str, object] = {}
    place = 0
    for name, shape in shapes.items():
        end = place + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            size += file.write(part)
        for tensor in tensors:
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                digest.update(chunk)
                size += file.write(chunk)
    if size != 8 + len(text) + place:
        raise ValueError(f"{path}: tensors of {size - 8 - len(text)} bytes for shapes of {place}")
    sync(path)
    return Digest(size, digest.hexdigest())


def digest_of(path: Path) -> Digest:
    """Of a file that stands already."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Digest(size, digest.hexdigest())


def fragment(kind: str, name: str, start: int) -> str:
    """Key of the elements from `start` of a flattened parameter."""
    return f"{kind}/{name}@{start}"


class Fragments:
    """What several files hold together of flattened parameters, by kind, name and place; they are mapped, not read."""

    def __init__(self, files: Iterable[object]):
        """`files` are open; see `fragments_of`."""
        self._places: dict[tuple[str, str], list[tuple[int, int, object, str]]] = {}
        for file in files:
            for key in file.keys():  # type: ignore[attr-defined]  # noqa: SIM118
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("@")
                (size,) = file.get_slice(key).get_shape()  # type: ignore[attr-defined]
                self._places.setdefault((kind, name), []).append((int(start), size, file, key))

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Elements `start` to `start + size`; KeyError where a part of them is in no file."""
        values, filled = torch.empty(size), 0
        for first, length, file, key in self._places.get((kind, name), []):
            low, high = max(start, first), min(start + size, first + length)
            if low < high:
                found = file.get_slice(key)[low - first : high - first]  # type: ignore[attr-defined]
                values[low - start : high - start] = found
                filled += high - low
        if filled != size:
            raise KeyError(f"{kind} of {name}: {filled} of the elements {start} to {start + size}")
        return values


@contextmanager
def fragments_of(paths: Iterable[Path]) -> Iterator[Fragments]:
    """The fragments in these files."""
    with ExitStack() as stack:
        yield Fragments([stack.enter_context(safe_open(path, "pt")) for path in paths])
