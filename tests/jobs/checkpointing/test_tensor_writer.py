"""The safetensors library reads the files that we write."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maelstream.jobs.checkpointing.digest import digest_of
from maelstream.jobs.checkpointing.tensor_writer import fragment, fragments_of, write_tensors


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(()), "c": torch.randn(5, 2).T, "d": torch.empty(0, 7)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    digest = write_tensors(tmp_path / "f", shapes, iter(tensors.values()))
    found = load_file(tmp_path / "f")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    data = (tmp_path / "f").read_bytes()
    assert (digest.bytes, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert digest_of(tmp_path / "f") == digest


def test_tensors_whose_sizes_differ_from_their_shapes_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensors have 8 bytes, their shapes 12"):
        write_tensors(tmp_path / "f", {"a": (3,)}, [torch.zeros(2)])


def test_fragments_of_many_files_are_read_across_their_boundaries(tmp_path: Path) -> None:
    whole = torch.randn(10)
    for number, (start, end) in enumerate([(0, 4), (4, 5), (5, 10)]):
        write_tensors(tmp_path / str(number), {fragment("m", "w", start): (end - start,)}, [whole[start:end]])
    with fragments_of([tmp_path / "2", tmp_path / "0", tmp_path / "1"]) as fragments:
        for start in range(10):
            for end in range(start, 11):
                assert torch.equal(fragments.read("m", "w", start, end - start), whole[start:end])
        with pytest.raises(KeyError, match="1 of the elements 9 to 11"):
            fragments.read("m", "w", 9, 2)
