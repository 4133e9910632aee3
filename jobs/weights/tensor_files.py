"""Reads the tensors of one file, or of several that an index lists: safetensors, or what `torch.save` wrote.

The content of a file decides what it is, not its suffix. Anything else gets an error that says what the file is and
what to do.
"""

import json
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from maelstream.jobs.weights.errors import WeightsError
from maelstream.jobs.weights.torch_file import NotTorchFileError, TorchFile
from maelstream.jobs.weights.torch_pickle import Items, TensorRef
from maelstream.model.formats import CLASS_TOKEN, is_average

FOLDER_NAMES = (
    *("weights.safetensors", "model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Files that a folder of weights may hold; the first one that exists is read."""
_FETCH = "fetch it again"
_KINDS = {  # how files of other kinds begin
    b"\x93NUMPY": "a NumPy array (.npy), not named tensors; save a dict of tensors with torch.save or as safetensors",
    b"\x89HDF": "an HDF5 file, such as of Keras; convert it to PyTorch's tensors first",
    b"GGUF": "a GGUF file; give the weights that it was converted from",
    b"version https://git-lfs": f"a Git LFS pointer, not the weights themselves; run `git lfs pull`, or {_FETCH}",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
}
_SAVE = "save its weights with torch.save(model.state_dict(), FILE)"
_DEPTH = 5  # levels of nested dicts in which weights are searched


@dataclass(frozen=True)
class FileContent:
    """What a file of weights holds."""

    tensors: dict[str, Tensor]
    """By the file's own names, on the CPU, in the dtype of the file."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The command line that a training checkpoint of the reference records; without it, empty."""


def files_of(file: Path) -> list[Path]:
    """The files that hold the tensors of `file`: the shards if it is an index, otherwise `file` alone.

    Raises:
        WeightsError: an index that cannot be read, or a missing shard.
    """
    if not file.name.endswith(".index.json"):
        return [file]
    return [file.parent / name for name in sorted(set(_weight_map(file).values()))]


def read_file(file: Path) -> FileContent:
    """Reads the weights in `file`, or in the shards that it lists.

    Raises:
        WeightsError: a file that is missing, damaged or of another kind, that asks to run code, or that holds several
            models.
    """
    if not file.name.endswith(".index.json"):
        return _read_one(file)
    listed, tensors = _weight_map(file), dict[str, Tensor]()
    for shard in files_of(file):
        found = _read_one(shard).tensors
        if missing := [name for name, holder in listed.items() if holder == shard.name and name not in found]:
            raise WeightsError(f"{shard} lacks {missing[0]}, which {file.name} lists in it; {_FETCH}")
        tensors |= found
    return FileContent(tensors)


@cache
def report(message: str) -> None:
    """Prints a note about weights on stderr, once per process and on one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"maelstream: {message}", file=sys.stderr, flush=True)


def _weight_map(index: Path) -> dict[str, str]:
    """The file name of each tensor, from an index of Hugging Face."""
    try:
        listed = json.loads(index.read_text())["weight_map"]
        names = set(listed.values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError
    except OSError as error:
        raise WeightsError(f"{index} cannot be read ({error.strerror}); give a run or a file") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise WeightsError(f"{index} is no index of shards: it needs a `weight_map` of file names; {_FETCH}") from None
    if missing := sorted(name for name in names if not (index.parent / name).is_file()):
        raise WeightsError(f"{index.parent} lacks {', '.join(missing)} of {len(names)} shards; {_FETCH}")
    return listed


def _read_one(file: Path) -> FileContent:
    try:
        with file.open("rb") as opened:
            start = opened.read(1024)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror or 'not found'}); give a run or a file") from None
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        try:
            return FileContent(load_file(file))
        except SafetensorError:
            raise WeightsError(
                f"{file} is truncated or is not a file of weights (a safetensors file); {_FETCH}"
            ) from None
    if kind := _other_kind(file, start):
        raise WeightsError(f"{file} is {kind}")
    try:
        opened_file = TorchFile(file)
    except NotTorchFileError as error:
        raise WeightsError(f"{file} is {error}, or is not a file of weights; {_SAVE}") from None
    except Exception as error:  # damage in a pickle can raise nearly anything
        raise _damaged(file, error) from None
    with opened_file:
        return _read_torch(file, opened_file)


def _damaged(file: Path, error: Exception) -> WeightsError:
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    return WeightsError(f"{file} is truncated or is not a file of weights ({reason}); {_FETCH}")


def _other_kind(file: Path, start: bytes) -> str:
    """What a file is that is neither safetensors nor of torch.save, and what to do; "" if it may be of torch.save."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return f"empty; {_FETCH}"
    for begin, kind in _KINDS.items():
        if start.startswith(begin):
            return kind
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"a web page, not weights: the download failed; {_FETCH}"
    if text.startswith((b"{", b"[")):
        return f"JSON text, not weights; {_FETCH}, or give the file next to it"
    if file.suffix == ".onnx" or re.match(rb"\x08[\x01-\x14](\x12|\x1a|:|B)", start):
        return f"an ONNX graph, which has other names; give the PyTorch model that it was exported from ({_SAVE})"
    if start.startswith(b"PK\x03\x04"):
        return _zip_kind(file)
    if start[257:262] == b"ustar" or tarfile.is_tarfile(file):
        return _tar_kind(file)
    if start[:1] != b"\x80":
        return f"not a file of weights that can be read (it begins with {start[:8]!r}); {_FETCH}"
    return ""


def _zip_kind(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return f"truncated or damaged (a zip file without its end); {_FETCH}"
    tails = {name.partition("/")[2] for name in names}
    if "constants.pkl" in tails or any(tail.startswith("code/") for tail in tails):
        return f"TorchScript, a program with its weights; {_SAVE.replace('model.', 'torch.jit.load(SCRIPT).')}"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz); save a dict of tensors with torch.save or as safetensors"
    if "data.pkl" in tails | set(names):
        return ""
    some = ", ".join(names[:3]) or "nothing"
    return f"a zip file that torch.save did not write (it holds {some}); unpack it, and give the file of weights in it"


def _tar_kind(file: Path) -> str:
    try:
        with tarfile.open(file) as archive:
            first = [member.name for member in (archive.next() for _ in range(4)) if member is not None]
    except tarfile.TarError:
        return f"a damaged tar file; {_FETCH}"
    if {"pickle", "storages", "tensors"} & {name.removeprefix("./") for name in first}:
        return ""  # torch 0.1
    return "a tar file; unpack it, and give the file of weights in it"


def _read_torch(file: Path, opened: TorchFile) -> FileContent:
    content = opened.content
    if isinstance(content, Items) and type(content) is not Items and not content:
        name = type(content).__name__
        raise WeightsError(
            f"{file} holds a whole object ({name}), whose code is never run, not a dict of tensors; {_SAVE}"
        )
    if opened.called:
        raise WeightsError(
            f"{file} holds code ({opened.called[0]}) next to its tensors, which is never run; "
            "ask its author for a file of tensors"
        )
    if not isinstance(content, dict):
        raise WeightsError(
            f"{file} holds a {type(content).__name__} instead of a dict of tensors; give a file of weights"
        )
    chosen = _chosen_model(file, content)
    try:
        tensors = {str(name): opened.tensor(ref) for name, ref in chosen.items() if isinstance(ref, TensorRef)}
    except Exception as error:  # references of a damaged file can raise nearly anything
        raise _damaged(file, error) from None
    arguments = content.get("args")
    attributes = arguments.attributes if isinstance(arguments, Items) else arguments
    return FileContent(tensors, attributes if isinstance(attributes, dict) else {})


def _chosen_model(file: Path, content: dict[Any, Any]) -> dict[Any, Any]:
    """The one dict of tensors that holds a ViT; the trained weights if their average over steps is next to them."""
    models = dict(_models(content, "", _DEPTH))
    if not models:  # the caller names the first tensors
        return next(_dicts_of_tensors(content, _DEPTH), content)
    plain = [name for name in models if not is_average(name)]
    if len(models) > 1 and len(plain) != 1:
        listed = ", ".join(models)
        raise WeightsError(f"{file} holds several models: {listed}; save the one you want as a file of its own")
    chosen = plain[0] if plain else next(iter(models))
    if len(models) > 1 or not plain:
        others = ", ".join(name for name in models if name != chosen)
        beside = f", and its average {others} is left out" if others else ", an average of the weights over steps"
        report(f"{file}: reading {chosen}{beside}")
    return models[chosen]


def _models(content: dict[Any, Any], name: str, depth: int) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Dicts of tensors with a class token below `content`, by the keys that lead to them."""
    if any(isinstance(key, str) and CLASS_TOKEN.search(key) for key, value in content.items() if _is_tensor(value)):
        yield name, content
        return
    for key, value in content.items() if depth else ():
        if isinstance(value, dict) and isinstance(key, str) and "optim" not in key:  # moments have parameters' names
            yield from _models(value, f"{name}.{key}".lstrip("."), depth - 1)


def _dicts_of_tensors(content: dict[Any, Any], depth: int) -> Iterator[dict[Any, Any]]:
    if any(_is_tensor(value) for value in content.values()):
        yield content
    for value in content.values() if depth else ():
        if isinstance(value, dict):
            yield from _dicts_of_tensors(value, depth - 1)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorRef)
