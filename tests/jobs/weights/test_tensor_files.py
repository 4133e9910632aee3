"""What people have as files of weights: wrapped, nested, in shards, and files that are something else."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maelstream.jobs.weights.reading import WeightsError, mae_weights, read_weights
from maelstream.jobs.weights.tensor_files import report
from maelstream.model.config import MAEConfig
from maelstream.model.formats import to_hf_file
from maelstream.model.mae import MAE
from tests.jobs.weights.test_torch_file import attacks, plain_data

TINY = MAEConfig((32, 32), patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return MAE(TINY, seed=4).state_dict()


@pytest.fixture(autouse=True)
def forget_reports() -> None:
    report.cache_clear()


def assert_read(path: Path, expected: dict[str, Tensor]) -> None:
    found = mae_weights(read_weights(path), TINY)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def one_line(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


PREFIXES = ["module.", "_orig_mod.", "model.", "encoder.", "backbone.", "vit.", "base_model.", "net.trunk."]
PREFIXES += ["module._orig_mod.", "_orig_mod.module.", "model.module.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", ["reference", "hf"])
def test_a_prefix_of_every_name_is_taken_away(
    tmp_path: Path, weights: dict[str, Tensor], prefix: str, names: str
) -> None:
    renamed = to_hf_file(weights) if names == "hf" else weights
    torch.save({"model": prefixed(renamed, prefix)}, tmp_path / "x.pth")
    save_file(prefixed(renamed, prefix), tmp_path / "x.safetensors")
    for file in ("x.pth", "x.safetensors"):
        assert_read(tmp_path / file, weights)


def test_wrappers_of_each_block_are_taken_away(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """torch.compile and activation checkpointing can wrap every block."""
    renamed = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in weights.items()}
    torch.save(renamed, tmp_path / "x.pth")
    assert_read(tmp_path / "x.pth", weights)


def test_the_dicts_of_training_libraries_are_read(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    moments = {"state": {0: {"exp_avg": torch.zeros(2)}}, "exp_avg": prefixed(weights, "module.")}
    for content in (
        {"module": weights, "ds_config": {"zero": 1}, "param_shapes": [OrderedDict(w=torch.Size([2]))]},  # DeepSpeed
        {"state_dict": prefixed(weights, "model."), "pytorch-lightning_version": "2", "hyper_parameters": {}},
        {"epoch": 3, "net": weights, "optimizer": moments},
        {"checkpoint": {"model_state_dict": prefixed(weights, "module.")}},
        {"model": weights, **plain_data()},
    ):
        torch.save(content, tmp_path / "x.pth")
        assert_read(tmp_path / "x.pth", weights)


@pytest.mark.parametrize(("model", "average"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_of_a_model_and_its_average_the_model_is_read_and_the_note_says_so(
    tmp_path: Path, weights: dict[str, Tensor], model: str, average: str, capsys: pytest.CaptureFixture[str]
) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    torch.save({average: zeros, model: weights}, tmp_path / "both.pth")
    assert_read(tmp_path / "both.pth", weights)
    assert capsys.readouterr().err.strip().endswith(f"reading {model}, and its average {average} is left out")
    torch.save({average: weights}, tmp_path / "average.pth")
    assert_read(tmp_path / "average.pth", weights)
    assert f"reading {average}, an average of the weights" in capsys.readouterr().err


def test_several_models_and_mixtures_are_one_line(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"student": weights, "teacher": weights}, tmp_path / "x.pth")
    assert "holds several models: student, teacher; save the one you want" in one_line(tmp_path / "x.pth")
    torch.save(prefixed(weights, "a.") | prefixed(weights, "b."), tmp_path / "x.pth")
    assert "several models, whose names begin with 'a.', 'b.'" in one_line(tmp_path / "x.pth")
    mixture = {("module." if "blocks" in name or "cls" in name else "") + name: t for name, t in weights.items()}
    torch.save(mixture, tmp_path / "x.pth")
    assert "module.cls_token has the prefix 'module.', and " in one_line(tmp_path / "x.pth")
    twice = weights | {"blocks.0._orig_mod.norm1.bias": torch.zeros(32)}
    torch.save(twice, tmp_path / "x.pth")
    assert "two tensors have the same name" in one_line(tmp_path / "x.pth")


def test_tensors_outside_the_model_are_left_out_and_named(
    tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(prefixed(weights, "model.") | {"projector.weight": torch.zeros(2)}, tmp_path / "x.pth")
    assert_read(tmp_path / "x.pth", weights)
    assert "left out, because no encoder or decoder has them: projector.weight" in capsys.readouterr().err


def write_shards(folder: Path, weights: dict[str, Tensor], stem: str, suffix: str) -> list[str]:
    """Three shards and their index, as transformers writes them; returns the names of the shards."""
    folder.mkdir(exist_ok=True)
    names = list(weights)
    shards = [f"{stem}-{number:05d}-of-00003{suffix}" for number in (1, 2, 3)]
    holders = {name: shards[number * 3 // len(names)] for number, name in enumerate(names)}
    for shard in shards:
        part = {name: weights[name] for name in names if holders[name] == shard}
        save_file(part, folder / shard) if suffix == ".safetensors" else torch.save(part, folder / shard)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": holders}))
    return shards


@pytest.mark.parametrize(("stem", "suffix"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_shards_are_read_and_a_missing_one_is_named(
    tmp_path: Path, weights: dict[str, Tensor], stem: str, suffix: str
) -> None:
    folder = tmp_path / "hub"
    shards = write_shards(folder, to_hf_file(weights), stem, suffix)
    index = folder / f"{stem}{suffix}.index.json"
    assert_read(folder, weights)
    assert_read(index, weights)
    (folder / shards[1]).rename(folder / "other")
    assert f"lacks {shards[1]} of 3 shards; fetch it again" in one_line(folder)
    (folder / shards[2]).rename(folder / shards[1])
    (folder / "other").rename(folder / shards[2])
    with pytest.raises(WeightsError, match=rf"{shards[1]} lacks .*, which {index.name} lists in it; fetch it again"):
        read_weights(folder)
    for text in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.bin"}}', '{"weight_map": 3}'):
        index.write_text(text)
        assert "is no index of shards" in one_line(index)


def test_of_a_folder_with_both_kinds_of_shards_the_safetensors_are_read(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    write_shards(tmp_path / "hub", zeros, "pytorch_model", ".bin")
    torch.save(zeros, tmp_path / "hub" / "pytorch_model.bin")
    write_shards(tmp_path / "hub", weights, "model", ".safetensors")
    assert_read(tmp_path / "hub", weights)


def test_the_content_decides_the_format_and_not_the_suffix(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "x.pth")
    torch.save(weights, tmp_path / "x.safetensors")
    torch.save(weights, tmp_path / "no suffix", _use_new_zipfile_serialization=False)
    for name in ("x.pth", "x.safetensors", "no suffix"):
        assert_read(tmp_path / name, weights)


def npz(path: Path) -> None:
    np.savez(path, w=np.ones(3))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photographs/1.jpg", b"x")


def tarred(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def script(path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))


def truncated(path: Path, keep: float, **options: Any) -> None:
    torch.save({"model": {"cls_token": torch.zeros(9999)}}, path, **options)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


ONNX = b"\x08\x08\x12\x07pytorch\x1a\x062.15.0:\x86\x01\n"  # a ModelProto: ir_version 8, producer, version, graph
OTHERS = {
    "npy": (lambda path: np.save(path.open("wb"), np.ones(3)), "a NumPy array (.npy)"),
    "npz": (lambda path: npz(path.open("wb")), "a NumPy archive (.npz)"),
    "script": (script, "is TorchScript, a program with its weights; save its weights with torch.save(torch.jit.load"),
    "module": (lambda path: torch.save(nn.Linear(2, 2), path), "a whole object (torch.nn.modules.linear.Linear)"),
    "zip": (zipped, "a zip file that torch.save did not write (it holds photographs/1.jpg)"),
    "html": (
        lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"),
        "a web page, not weights",
    ),
    "json": (lambda path: path.write_text('{"error": "Entry not found"}'), "JSON text, not weights"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    "empty": (lambda path: path.touch(), "is empty; fetch it again"),
    "onnx": (lambda path: path.write_bytes(ONNX), "an ONNX graph"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "compressed with gzip; unpack it first"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file, such as of Keras"),
    "tar": (lambda path: tarred(path, "a.jpg", "b.jpg"), "a tar file; unpack it"),
    "torch 0.1": (lambda path: tarred(path, "sys_info", "pickle", "storages", "tensors"), "is truncated"),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps({"w": np.ones(2)})),
        "a pickle that torch.save did",
    ),
    "text": (lambda path: path.write_text("0.1 0.2 0.3"), "not a file of weights that can be read"),
    "cut zip": (lambda path: truncated(path, 0.5), "truncated or damaged"),
    "cut older": (lambda path: truncated(path, 0.5, _use_new_zipfile_serialization=False), "is truncated"),
    "cut pickle": (lambda path: truncated(path, 0.002, _use_new_zipfile_serialization=False), "is truncated"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    write, expected = OTHERS[kind]
    for name in ("weights.pth", "weights.safetensors", "weights.bin"):
        write(tmp_path / name)
        assert expected in one_line(tmp_path / name)


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_a_file_with_code_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, weights: dict[str, Tensor], name: str
) -> None:
    proof = tmp_path / "ran"
    torch.save({"model": weights, "args": attacks(proof)[name]}, tmp_path / "evil.pth")
    text = one_line(tmp_path / "evil.pth")
    assert "holds code (" in text and not proof.exists()


def test_a_whole_model_with_the_weights_inside_says_how_to_save_them(tmp_path: Path) -> None:
    torch.save(MAE(TINY), tmp_path / "x.pth")
    assert "a whole object (maelstream.model.mae.MAE)" in one_line(tmp_path / "x.pth")
    assert "torch.save(model.state_dict(), FILE)" in one_line(tmp_path / "x.pth")


def test_read_weights_accepts_a_string(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / "x.pth")
    assert read_weights(str(tmp_path / "x.pth")).grid == (4, 4)
