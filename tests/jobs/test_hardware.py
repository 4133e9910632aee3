"""Rates of data sheets by the names that torch gives."""

import pytest
import torch

from maelstream.jobs.hardware import datasheet_flops_per_s, matrix_flops_per_s


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
def test_bf16_of_a_card_is_known_or_not_guessed(name: str, tflops: float | None) -> None:
    assert datasheet_flops_per_s(name, "bf16") == (tflops and tflops * 1e12)


def test_a_v100_has_float32() -> None:
    assert datasheet_flops_per_s("Tesla V100-SXM2-32GB", "fp32") == 15.7e12


def test_products_of_this_machine_have_a_rate() -> None:
    assert 1e8 < matrix_flops_per_s(torch.float32, torch.device("cpu")) < 1e14
