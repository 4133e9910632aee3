"""Writes float32 safetensors files tensor by tensor and hashes them on the way.

The library's `save_file` needs all tensors at once and holds the interpreter lock while it writes. This writer takes
one tensor after another, so a thread can run it while training continues. The library reads the result.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from maelstream.jobs.checkpointing.digest import CHUNK, Digest
from maelstream.shards.durable import sync


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor]) -> Digest:
    """Writes the float32 `tensors`, on the CPU and in the order of `shapes`, and syncs the file to the disk."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            size += file.write(part)
        for tensor in tensors:
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                digest.update(chunk)
                size += file.write(chunk)
    if size != 8 + len(text) + offset:
        raise ValueError(f"{path}: the tensors have {size - 8 - len(text)} bytes, their shapes {offset}")
    sync(path)
    return Digest(size, digest.hexdigest())


def fragment(kind: str, name: str, start: int) -> str:
    """Key of the elements from `start` of a flattened parameter."""
    return f"{kind}/{name}@{start}"


class Fragments:
    """The elements of flattened parameters that several memory-mapped files hold, by kind, name and position."""

    def __init__(self, files: Iterable[object]):
        """`files` are open safetensors files; see `fragments_of`. ValueError if one holds anything but fragments."""
        self._fragments: dict[tuple[str, str], list[tuple[int, int, object, str]]] = {}
        for file in files:
            for key in file.keys():  # type: ignore[attr-defined]  # noqa: SIM118
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("@")
                (size,) = file.get_slice(key).get_shape()  # type: ignore[attr-defined]
                if file.get_slice(key).get_dtype() != "F32":  # type: ignore[attr-defined]
                    raise ValueError(f"{key} is not of type F32")
                self._fragments.setdefault((kind, name), []).append((int(start), size, file, key))

    def fault(self, sizes: Mapping[str, int]) -> str:
        """Describes which moment of a parameter is incomplete; "" if all are whole. `sizes` are elements by name."""
        kinds = {kind for kind, _ in self._fragments}
        if not kinds:
            return "it has no moments of the optimizer"
        for name, size in sizes.items():
            for kind in sorted(kinds):
                parts = sorted((start, length) for start, length, *_ in self._fragments.get((kind, name), []))
                end = 0
                for start, length in parts:
                    end = end + length if start == end else -1
                if end != size:
                    return f"its {kind} of {name} is incomplete, or of another size than the model's"
        return ""

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Reads elements `start` to `start + size`; KeyError if the files lack a part of them."""
        values, filled = torch.empty(size), 0
        for first, length, file, key in self._fragments.get((kind, name), []):
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
    """Opens these files and yields their fragments."""
    with ExitStack() as stack:
        yield Fragments([stack.enter_context(safe_open(path, "pt")) for path in paths])
