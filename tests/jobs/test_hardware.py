"""Rates from data sheets, by the GPU names that torch returns; measured rates of this machine."""

import pytest
import torch

from maelstream.jobs.hardware import (
    datasheet_flops_per_s,
    matrix_flops_per_s,
    multiplies_bf16,
    process_device,
    update_bytes_per_s,
)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA A1000", None),
    ],
)
def test_the_bf16_rate_of_an_unknown_gpu_is_none(name: str, tflops: float | None) -> None:
    assert datasheet_flops_per_s(name, "bf16") == (tflops and tflops * 1e12)


def test_a_v100_has_an_fp32_rate() -> None:
    assert datasheet_flops_per_s("Tesla V100-SXM2-32GB", "fp32") == 15.7e12


def test_matrix_products_of_this_machine_have_a_plausible_rate() -> None:
    assert 1e8 < matrix_flops_per_s(torch.float32, torch.device("cpu")) < 1e14


def test_updates_in_place_of_this_machine_have_a_plausible_rate() -> None:
    assert 1e8 < update_bytes_per_s(torch.device("cpu")) < 1e13


def test_a_process_without_a_gpu_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert process_device() == process_device(3) == torch.device("cpu")


def test_each_rank_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert process_device() == torch.device("cuda") and process_device(3) == torch.device("cuda", 3)
    assert multiplies_bf16(torch.device("cuda"))
