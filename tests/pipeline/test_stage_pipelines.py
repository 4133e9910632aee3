"""Decoding and augmenting in two pipelines gives the images of the one decoder."""

import numpy as np
import torch

from maelstream.pipeline.config import DecodeConfig
from maelstream.pipeline.decode import CpuDecoder, Decoded, EncodedBatch
from maelstream.pipeline.stage_pipelines import augment_only, decode_only
from tests.conftest import encoded, photograph

SIZE, CPU = (32, 48), torch.device("cpu")


def batches() -> list[EncodedBatch]:
    windows = np.array([[10, 20, 100, 80], [0, 0, 300, 200]], np.int32)
    resizes = np.tile(np.array([*SIZE, 0, 0], np.int32), (2, 1))
    return [
        EncodedBatch(
            [encoded(photograph(seed=2 * number + k), "JPEG") for k in range(2)],
            windows,
            resizes,
            np.array([False, True]),
            None,
        )
        for number in range(2)
    ]


def test_the_two_halves_process_batches_in_turn_and_equal_the_decoder() -> None:
    data = batches()
    decoder = CpuDecoder(lambda number: data[number % 2], 2, SIZE, 1, CPU)
    expected = [decoder.run() for _ in range(3)]
    decode = decode_only(data, SIZE, 1, CPU, DecodeConfig())
    decoded = decode()
    assert isinstance(decoded, Decoded)
    assert [np.asarray(decoded.windows[k]).shape for k in range(2)] == [(80, 100, 3), (200, 300, 3)]
    augment, window_bytes = augment_only(data, SIZE, 1, CPU, DecodeConfig())
    for images in expected:
        actual = augment()
        assert isinstance(actual, torch.Tensor) and torch.equal(actual, images)
    assert window_bytes == (80 * 100 + 200 * 300) * 3 / 2
