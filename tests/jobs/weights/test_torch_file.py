"""Files of torch.save are read without running anything in them, and as torch itself reads them."""

import argparse
import collections
import contextlib
import datetime
import functools
import io
import operator
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maelstream.jobs.weights.torch_file import NotTorchFileError, TorchFile
from maelstream.jobs.weights.torch_pickle import Items, TensorRef

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.float8_e4m3fn, torch.uint16]


def read(path: Path) -> tuple[Any, list[str]]:
    """What a file holds, with its tensors, and the functions that it asks to call."""
    with TorchFile(path) as file:

        def whole(value: Any) -> Any:
            if isinstance(value, TensorRef):
                return file.tensor(value)
            return {key: whole(item) for key, item in value.items()} if isinstance(value, dict) else value

        return whole(file.content), file.called


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape and found.is_contiguous()
    as_bytes = [each.contiguous().flatten().view(torch.uint8) for each in (found, expected)]
    assert torch.equal(*as_bytes)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_of_every_dtype_stride_and_kind_equal_torchs(tmp_path: Path, zipped: bool, protocol: int) -> None:
    base = torch.randn(6, 8)
    content = {str(dtype): (100 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES}
    content |= {"transposed": base.T, "strided": base[1::2, ::3], "row": base[2], "shared": base}
    content |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "expanded": torch.ones(1, 3).expand(4, 3)}
    content |= {"parameter": nn.Parameter(base), "buffer": nn.Buffer(base[0])}
    path = saved(tmp_path / "x.pth", content, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found, called = read(path)
    assert not called and found.keys() == content.keys()
    for name, tensor in content.items():
        assert_equal(found[name], tensor.detach())


def plain_data() -> dict[str, Any]:
    """What training code stores next to weights."""
    windows = pathlib.PureWindowsPath("C:/data/train")
    counts = collections.defaultdict(list, {"a": [1]})
    return {
        "args": argparse.Namespace(lr=1.5e-4, output_dir=Path("/out"), norm_pix_loss=True),
        "paths": [pathlib.PurePosixPath("a/b"), windows],
        "scalars": [np.float64(0.5), np.int64(3), np.float32(1), np.bool_(True), np.str_("x")],
        "arrays": [np.arange(6.0).reshape(2, 3), np.array(["a", "b"]), np.asfortranarray(np.eye(3)), np.dtype("f4")],
        "ordered": collections.OrderedDict(b=1, a=2),
        "counted": [counts, collections.Counter("abca"), collections.deque([1, 2])],
        "torch": [torch.device("cuda", 0), torch.float16, torch.Size([2, 3]), torch.strided],
        "other": [{1, 2}, frozenset([3]), b"bytes", 2 + 3j, bytearray(b"x"), range(3), datetime.datetime(2026, 1, 1)],
    }


class Settings(dict):
    """A subclass of dict as configuration libraries have; the reader does not know it."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_data_next_to_weights_is_read_without_a_call(tmp_path: Path, zipped: bool, protocol: int) -> None:
    content = {"model": {"w": torch.ones(2)}, **plain_data(), "config": Settings(model=Settings(depth=12))}
    path = saved(tmp_path / "x.pth", content, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found, called = read(path)
    assert not called and torch.equal(found["model"]["w"], torch.ones(2))
    assert found["ordered"] == {"b": 1, "a": 2} and found["config"] == {"model": {"depth": 12}}
    with TorchFile(path) as file:
        assert file.content["args"].attributes == {"lr": 1.5e-4, "output_dir": "/out", "norm_pix_loss": True}
        assert file.content["paths"][0] == "a/b"


@pytest.mark.parametrize("old", ["numpy.core", "numpy._core"])
def test_names_of_numpy_1_and_2_and_of_paths_of_windows_are_read_on_any_system(tmp_path: Path, old: str) -> None:
    content = {"metric": np.float64(0.5), "array": np.ones(2), "out": Path("/out")}
    path = saved(tmp_path / "x.pth", content, pickle_protocol=2, _use_new_zipfile_serialization=False)
    new = "numpy._core" if b"numpy._core" in path.read_bytes() else "numpy.core"
    changed = path.read_bytes().replace(new.encode(), old.encode()).replace(b"PosixPath", b"WindowsPath")
    path.write_bytes(changed)
    assert b"pathlib\nWindowsPath" in changed and f"{old}.multiarray".encode() in changed
    assert read(path)[0]["out"] == "/out" and read(path)[1] == []


class TarPickler(pickle.Pickler):
    """Writes tensors as keys, as torch 0.1 did."""

    def __init__(self, file: Any):
        super().__init__(file, protocol=2)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors)


def saved_by_torch_0_1(path: Path, content: Any) -> Path:
    """The tar format; each tensor has a storage of its own, and one more is a view of the first storage."""
    objects, storages, tensors = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickler = TarPickler(objects)
    pickler.dump(content)
    found = pickler.tensors
    storages.write(pickle.dumps(len(found), 2))
    tensors.write(pickle.dumps(len(found) + 1, 2))
    for key, tensor in enumerate(found, 1):
        whole = tensor.contiguous()
        storages.write(pickle.dumps((key, "cpu", torch.FloatStorage), 2))
        storages.write(whole.numel().to_bytes(8, "little") + whole.numpy().tobytes())
    storages.write(pickle.dumps([(99, 1, 1, 2)], 2))
    places = [(key, key, tensor) for key, tensor in enumerate(found, 1)] + [(98, 99, torch.zeros(2))]
    for key, storage, tensor in places:
        tensors.write(pickle.dumps((key, storage, torch.FloatTensor), 2))
        shape = [*tensor.shape, *tensor.contiguous().stride(), 0]
        tensors.write(struct.pack(f"<ii{len(shape)}q", tensor.ndim, 0, *shape))
    parts = {"sys_info": io.BytesIO(pickle.dumps({}, 2)), "pickle": objects, "storages": storages, "tensors": tensors}
    with tarfile.open(path, "w") as archive:
        for name, buffer in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(buffer.getvalue())
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    return path


def test_the_tar_format_of_torch_0_1_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 3, "w": torch.randn(3, 4), "b": torch.randn(5), "s": torch.tensor(2.0)}
    path = saved_by_torch_0_1(tmp_path / "x.pth", content)
    expected, (found, called) = torch.load(path, weights_only=False), read(path)
    assert not called and found.keys() == expected.keys() and found["epoch"] == 3
    for name in ("w", "b", "s"):
        assert_equal(found[name], expected[name])
        assert_equal(found[name], content[name])


class Reduced:
    """An object whose pickle asks to call a function."""

    def __init__(self, function: Any, *args: Any, state: Any = None):
        self.function, self.args, self.state = function, args, state

    def __call__(self) -> None:
        """pickle wants functions to be callable, and what a call returns may be one."""

    def __reduce__(self) -> tuple:
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def attacks(proof: Path) -> dict[str, Any]:
    """Objects that create the folder `proof` when a plain unpickler loads them."""
    code = f"__import__('os').mkdir({str(proof)!r})"
    mkdir = Reduced(getattr, Reduced(__import__, "os"), "mkdir")
    return {
        "posix.mkdir": Reduced(os.mkdir, str(proof)),
        "posix.system": Reduced(os.system, f"mkdir {proof}"),
        "builtins.eval": Reduced(eval, code),
        "builtins.exec": Reduced(exec, code),
        "builtins.getattr": Reduced(mkdir, str(proof)),
        "functools.partial": Reduced(functools.partial(os.mkdir, str(proof))),
        "operator.methodcaller": Reduced(operator.methodcaller("mkdir"), proof),
        "numpy.load": Reduced(np.load, str(proof)),
        "torch.serialization.load": Reduced(torch.load, str(proof)),
        "builtins.map": Reduced(list, Reduced(map, os.mkdir, [str(proof)])),
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_nothing_that_a_file_asks_to_call_is_called(tmp_path: Path, name: str, zipped: bool, protocol: int) -> None:
    proof = tmp_path / "ran"
    attack = attacks(proof)[name]
    path = tmp_path / "evil.pth"
    if protocol < 2:  # torch.save writes no such file, so the pickle in one is replaced
        buffer = io.BytesIO()
        saved(buffer, {})  # type: ignore[arg-type]
        with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w") as changed:
            for entry in archive.namelist():
                data = archive.read(entry)
                changed.writestr(entry, pickle.dumps({"args": attack}, protocol) if entry.endswith(".pkl") else data)
    else:
        saved(path, {"args": attack}, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found, called = read(path)
    assert called and not proof.exists()
    assert name in called or any(each.startswith(("operator.", "functools.", "builtins.")) for each in called)
    assert not callable(found["args"]) or isinstance(found["args"], Items)


def test_a_file_cannot_change_what_the_next_file_is_read_with(tmp_path: Path) -> None:
    """BUILD sets attributes of any object on the stack, also of a function or a class."""

    def pickled(target: bytes, state: bytes) -> bytes:
        return b"\x80\x02}X\x01\x00\x00\x00a" + target + state + b"bs."

    replaced = b"N}X\x09\x00\x00\x00_functioncbuiltins\neval\ns\x86"  # (None, {"_function": eval})
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nfloat32\n"):
        buffer = io.BytesIO()
        torch.save({}, buffer)
        path = tmp_path / "x.pth"
        with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w") as changed:
            for entry in archive.namelist():
                data = pickled(target, replaced) if entry.endswith("data.pkl") else archive.read(entry)
                changed.writestr(entry, data)
        with contextlib.suppress(Exception):  # most of these are damage; what counts is what they leave behind
            read(path)
        good = saved(tmp_path / "good.pth", collections.OrderedDict(w=torch.ones(3)))
        assert torch.equal(read(good)[0]["w"], torch.ones(3))


def test_a_tensor_beyond_its_storage_is_an_error(tmp_path: Path) -> None:
    with TorchFile(saved(tmp_path / "x.pth", {"w": torch.ones(4)})) as file:
        ref = file.content["w"]
        for wrong in (
            ref._replace(offset=2),
            ref._replace(size=(5,)),
            ref._replace(stride=(2,)),
            ref._replace(offset=-9),
        ):
            with pytest.raises(RuntimeError):
                file.tensor(wrong)


def test_only_the_storages_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """A training checkpoint is mostly optimizer state."""
    path = saved(tmp_path / "x.pth", {"model": torch.ones(3), "optimizer": torch.zeros(1000)})
    with zipfile.ZipFile(path) as archive:
        (large,) = (entry for entry in archive.infolist() if entry.file_size == 4000)
    data = bytearray(path.read_bytes())
    start = data.index(bytes(4000), large.header_offset)
    data[start + 2000] = 1
    path.write_bytes(data)
    with TorchFile(path) as file:
        assert torch.equal(file.tensor(file.content["model"]), torch.ones(3))
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            file.tensor(file.content["optimizer"])


def test_pickles_and_zip_files_of_others_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"w": [1.0]}))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("notes.txt", "notes")
    for name in ("x.pkl", "x.zip"):
        with pytest.raises(NotTorchFileError, match=r"torch\.save did not write"):
            TorchFile(tmp_path / name)
