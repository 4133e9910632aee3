"""Crops of an evaluation from the decoder alone: no loader, no ranks."""

import numpy as np
import torch
from torch import Tensor

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.config import CropConfig
from maelstream.pipeline.decode import CpuDecoder, EncodedBatch
from maelstream.shards.dataset import Dataset
from maelstream.shards.reader import ShardReader


def central_images(dataset: Dataset, samples: np.ndarray, image_size: tuple[int, int]) -> Tensor:
    """Decodes the largest centre crop of each sample (margin 1)."""
    sizes = dataset.width[samples], dataset.height[samples]
    draws = AugmentSampler(0, CropConfig("none", margin=1), image_size).at(np.zeros_like(samples), samples, *sizes)
    batch = EncodedBatch.of(ShardReader(dataset, check_crc=True).read(samples), draws)
    return CpuDecoder(lambda _: batch, len(samples), image_size, threads=1, device=torch.device("cpu")).run()
