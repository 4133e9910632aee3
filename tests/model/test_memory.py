"""Memory of training: activations against measurements, properties of the formulas, FLOPs of recomputation."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.activation_memory import LiveTensors, bytes_per_image, discard_gradients
from benchmarks.fake_tensors import fake_mae
from maelstream.model.config import MAEConfig
from maelstream.model.flops import recomputed_flops, training_flops
from maelstream.model.mae import MAE
from maelstream.model.memory import activation_bytes, moved_bytes, parameter_count, state_bytes, traffic
from maelstream.model.sizes import PAPER_SIZES

SMALL = MAEConfig(image_size=(112, 112), dim=192, depth=3, heads=3, decoder_dim=96, decoder_depth=2, decoder_heads=3)
CONFIGS = {
    "small": SMALL,
    "deep decoder": dataclasses.replace(SMALL, depth=2, decoder_dim=192, decoder_depth=6),
    "encoder mask tokens": dataclasses.replace(SMALL, encoder_mask_tokens=True),
    "narrow MLP": dataclasses.replace(SMALL, mlp_ratio=2.0, mask_ratio=0.5),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_activation_bytes_are_within_15_percent_of_the_measured_peak(config: MAEConfig, checkpointing: bool) -> None:
    measured = bytes_per_image(config, checkpointing, torch.device("cpu"), bf16=False)
    assert activation_bytes(config, checkpointing, 4) == pytest.approx(measured, rel=0.15)


def test_activation_bytes_of_paper_models_agree_with_measurements() -> None:
    """MB per image in float32 from docs/measured/step.md: without and with activation checkpointing."""
    measured = {(768, 12, 12, 16): (84.6, 14.1), (1024, 24, 16, 16): (133.9, 17.2), (1280, 32, 16, 14): (242.0, 24.4)}
    for (dim, depth, heads, patch_size), figures in measured.items():
        config = MAEConfig(dim=dim, depth=depth, heads=heads, patch_size=patch_size)
        found = [activation_bytes(config, checkpointing, 4) / 1e6 for checkpointing in (False, True)]
        assert found == pytest.approx(figures, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name", PAPER_SIZES)
def test_activation_bytes_of_paper_models_in_bf16_are_within_5_percent(name: str, checkpointing: bool) -> None:
    """Compared with what an image adds to the peak of a forward and backward pass; fake tensors need no memory."""
    config = MAEConfig(**PAPER_SIZES[name]._asdict(), attention="sdpa")
    peaks = []
    for batch in (64, 128):
        mode = FakeTensorMode()
        model = fake_mae(config, "cpu", torch.bfloat16, mode)
        model.activation_checkpointing = checkpointing
        discard_gradients(model)
        with mode:
            images = torch.empty(batch, 3, *config.image_size, dtype=torch.uint8)
            keys = torch.empty(batch, dtype=torch.int64)
            with LiveTensors() as tensors:
                model(images, keys).backward()
        peaks.append(tensors.peak)
    assert activation_bytes(config, checkpointing, 2) == pytest.approx((peaks[1] - peaks[0]) / 64, rel=0.05)


def test_recomputed_flops_equal_the_counter_of_torch() -> None:
    def counted(checkpointing: bool) -> int:
        with torch.device("meta"):
            model = MAE(dataclasses.replace(SMALL, attention="math"))
            model.activation_checkpointing = checkpointing
            images, keys = torch.empty(1, 3, 112, 112, dtype=torch.uint8), torch.empty(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(images, keys).backward()
        return counter.get_total_flops()

    assert counted(False) == training_flops(SMALL)
    assert counted(True) - counted(False) == recomputed_flops(SMALL)


def test_state_of_one_rank_is_that_of_mixed_precision_adam() -> None:
    """2 + 12 bytes per parameter (Rajbhandari et al. 2020, section 3.1), and 4 for float32 gradient sums."""
    count = parameter_count(SMALL)
    for stage in (2, 3):
        state = state_bytes(SMALL, stage, 1)
        assert state.weights + state.gradients + state.master + state.moments == pytest.approx(18 * count, rel=1e-3)
    assert state_bytes(SMALL, 1, 1).gradients == pytest.approx(6 * count, rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partitioned_state_shrinks_with_the_number_of_ranks(stage: int) -> None:
    one, many = state_bytes(SMALL, stage, 1), state_bytes(SMALL, stage, 64)
    shared = {1: ("master", "moments"), 2: ("gradients", "master", "moments"), 3: ("weights", "gradients", "moments")}
    for name in one._fields[:4]:
        ratio = getattr(one, name) / getattr(many, name)
        assert ratio == pytest.approx(64 if name in (*shared[stage], "master") else 1, rel=0.02), name


def test_one_rank_sends_nothing_and_many_ranks_send_twice_what_they_reduce() -> None:
    assert traffic(SMALL, 1, 1, 4).sent(1) == 0
    assert traffic(SMALL, 1, 1000, 4).sent(1000) == pytest.approx((2 * 4 + 2) * parameter_count(SMALL), rel=0.01)


def test_stages_2_and_3_reduce_in_each_micro_batch() -> None:
    assert traffic(SMALL, 1, 8, 4) == traffic(SMALL, 1, 8, 1)
    assert traffic(SMALL, 2, 8, 4).all_reduced == 4 * traffic(SMALL, 2, 8, 1).all_reduced
    assert traffic(SMALL, 3, 8, 4).reduce_scattered == 4 * traffic(SMALL, 3, 8, 1).reduce_scattered


def test_moved_bytes_are_linear_in_depth_and_element_size() -> None:
    no_decoder_change = dataclasses.replace(SMALL, depth=6)
    grown = moved_bytes(no_decoder_change, False, 4) - moved_bytes(SMALL, False, 4)
    seen = 1 + SMALL.keep
    assert grown == 3 * seen * SMALL.dim * 4 * (27 + 6 * 4)
    assert moved_bytes(SMALL, True, 4) == 2 * moved_bytes(SMALL, True, 2) > moved_bytes(SMALL, False, 4)
