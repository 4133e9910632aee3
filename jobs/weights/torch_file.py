"""Files that `torch.save` wrote, in its zip format and in both older ones; nothing in a file is run.

`TorchFile.tensor` reads only the tensors that are needed: a training checkpoint is two thirds optimizer state. torch's
own `weights_only=True` also runs nothing, but refuses pickles that hold a path, a numpy scalar, a subclass of dict, or
protocol 4, and the format of torch 0.1.
"""

import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from maelstream.jobs.weights.torch_pickle import SafeUnpickler, StorageRef, TensorRef, tensor_ref

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older format


class NotTorchFileError(ValueError):
    """The file is a pickle or a zip file, but `torch.save` did not write it."""


class TorchFile:
    """An open file of `torch.save`; a context manager.

    Raises:
        NotTorchFileError: a pickle or a zip file of something else.
        Exception: any other kind, for a damaged file. Damage can raise nearly anything in a pickle.
    """

    content: Any
    """What was saved, from plain values, `Items` and `TensorRef`."""
    called: list[str]
    """Names of the functions that the file asks to call, which were not called."""

    def __init__(self, path: Path):
        self.called = []
        self._file: BinaryIO = path.open("rb")
        try:
            start = self._file.read(2)
            if start == b"PK":
                self._open_zip()
            elif start == b"\x80\x02" or not tarfile.is_tarfile(path):
                self._open_older()
            else:
                self._open_tar()
        except BaseException:
            self._file.close()
            raise
        self._storage = lru_cache(maxsize=1)(self._read_storage)  # tensors may be views of one large storage

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def tensor(self, ref: TensorRef) -> Tensor:
        """Reads a tensor: contiguous, on the CPU; RuntimeError if it does not fit into its storage."""
        storage = ref.storage
        if 0 in ref.size:
            return torch.empty(ref.size, dtype=ref.dtype)
        data = self._storage(storage.key)
        first, end = (number * storage.dtype.itemsize for number in (storage.start, storage.start + storage.length))
        if not 0 <= first < end <= len(data):
            raise RuntimeError(f"storage {storage.key} is shorter than its tensor")
        numbers = torch.frombuffer(data, dtype=torch.uint8)[first:end].view(ref.dtype)
        view = torch.as_strided(numbers, ref.size, ref.stride, numbers.storage_offset() + ref.offset)
        return view.clone(memory_format=torch.contiguous_format) if view.numel() < len(numbers) else view.contiguous()

    def _open_zip(self) -> None:
        archive = zipfile.ZipFile(self._file)
        found = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise NotTorchFileError("a zip file that torch.save did not write")
        prefix = found[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
            raise NotTorchFileError("written on a big-endian machine")
        with archive.open(found[0]) as file:
            self.content = SafeUnpickler(file, self.called).load()

        def read(key: str) -> bytearray:
            return bytearray(archive.read(f"{prefix}data/{key}"))

        self._read_storage: Callable[[str], bytearray] = read

    def _open_older(self) -> None:
        """Magic number, protocol, platform, the object, the keys of its storages, then each storage's size and data."""
        file = self._file
        file.seek(0)
        if SafeUnpickler(file, self.called).load() != _MAGIC:
            raise NotTorchFileError("a pickle that torch.save did not write")
        if SafeUnpickler(file, self.called).load() != 1001 or not isinstance(
            SafeUnpickler(file, self.called).load(), dict
        ):
            raise NotTorchFileError("a pickle of an unknown version of torch.save")
        unpickler = SafeUnpickler(file, self.called)
        self.content = unpickler.load()
        places: dict[str, tuple[int, int]] = {}  # first byte, and number of bytes
        for key in SafeUnpickler(file, self.called).load():
            count = int.from_bytes(file.read(8), "little")
            places[key] = file.tell(), count * unpickler.item_sizes[key]
            file.seek(places[key][1], 1)

        def read(key: str) -> bytearray:
            file.seek(places[key][0])
            data = bytearray(file.read(places[key][1]))
            if len(data) < places[key][1]:
                raise EOFError
            return data

        self._read_storage = read

    def _open_tar(self) -> None:
        """A tar file of torch 0.1: storages, tensors by key, and a pickle with keys of tensors."""
        self._file.seek(0)
        with tarfile.open(fileobj=self._file) as archive:
            members = {name: archive.extractfile(name) for name in ("storages", "tensors", "pickle")}
        storages, tensors, file = (member for member in members.values() if member is not None)
        data: dict[str, bytearray] = {}
        refs: dict[str, Any] = {}
        for _ in range(SafeUnpickler(storages, self.called).load()):
            key, _, dtype = SafeUnpickler(storages, self.called).load()
            count = int.from_bytes(storages.read(8), "little")
            data[str(key)] = bytearray(storages.read(count * dtype.itemsize))
            refs[str(key)] = StorageRef(str(key), dtype, 0, count)
        for target, root, offset, count in SafeUnpickler(storages, self.called).load():
            whole = refs[str(root)]
            refs[str(target)] = whole._replace(start=whole.start + offset, length=count)
        found: dict[str, TensorRef] = {}
        for _ in range(SafeUnpickler(tensors, self.called).load()):
            key, storage, _ = SafeUnpickler(tensors, self.called).load()
            dimensions = int.from_bytes(tensors.read(8)[:4], "little")
            size, stride = (struct.unpack(f"<{dimensions}q", tensors.read(8 * dimensions)) for _ in range(2))
            (offset,) = struct.unpack("<q", tensors.read(8))
            found[str(key)] = tensor_ref(refs[str(storage)], offset, size, stride)
        unpickler = SafeUnpickler(file, self.called)
        unpickler.tensors = found
        self.content = unpickler.load()
        self._read_storage = data.__getitem__
