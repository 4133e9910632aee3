"""Every image of a dataset once, in order, for any number of ranks; undecodable ones are reported, not counted."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from maelstream.pipeline.config import LoaderConfig, evaluation_margin
from maelstream.pipeline.eval_pass import Reading, every_image
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.reader import ShardReader
from tests.helpers.crops import central_images

SIZE = (32, 32)
ONE_THREAD = LoaderConfig(threads=1)


def batches_per_rank(dataset: Dataset, ranks: int, micro_batch_size: int, bad: list[BadSample]) -> list[list]:
    reading = Reading(SIZE, 1.25, micro_batch_size, ONE_THREAD)
    return [list(every_image(dataset, reading, rank, ranks, bad.append)) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 7), (1, 999), (2, 8), (3, 7), (7, 16)])
def test_every_image_comes_once_for_any_ranks_and_every_rank_gets_equally_many_batches(
    packed: Dataset, ranks: int, micro_batch_size: int
) -> None:
    found = batches_per_rank(packed, ranks, micro_batch_size, [])
    samples = np.concatenate([batch.samples[batch.counted] for rank in found for batch in rank])
    assert sorted(samples.tolist()) == list(range(len(packed)))
    assert len({len(rank) for rank in found}) == 1


def test_images_are_the_central_crops_of_their_samples(packed: Dataset) -> None:
    for batch in every_image(packed, Reading(SIZE, 1.0, 16, ONE_THREAD), 1, 2, lambda bad: None):
        assert torch.equal(batch.images, central_images(packed, batch.samples, SIZE))
    margins = [evaluation_margin((side, side)) for side in (32, 224, 448)]
    assert margins == [256 / 224, 256 / 224, 1.0]
    transform = transforms.Compose([transforms.Resize(36, InterpolationMode.BICUBIC), transforms.CenterCrop(32)])
    for batch in every_image(packed, Reading(SIZE, None, 60, ONE_THREAD), 0, 1, lambda bad: None):
        for image, data in zip(batch.images, ShardReader(packed, True).read(batch.samples), strict=True):
            expected = np.asarray(transform(Image.open(io.BytesIO(data.tobytes())))).transpose(2, 0, 1)
            assert np.abs(image.numpy().astype(int) - expected).mean() < 0.5  # of 255 levels


def damaged(dataset: Dataset, folder: Path, samples: list[int]) -> Dataset:
    """A copy in which these samples consist of zeros."""
    shutil.copytree(dataset.folder, folder)
    for sample in samples:
        with (folder / dataset.shard_names[dataset.shard[sample]]).open("r+b") as file:
            file.seek(int(dataset.offset[sample]))
            file.write(bytes(int(dataset.size[sample])))
    return Dataset.open(folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_undecodable_images_are_reported_and_not_counted(packed: Dataset, tmp_path: Path, ranks: int) -> None:
    dataset, bad = damaged(packed, tmp_path / "copy", [3, 59]), list[BadSample]()
    found = batches_per_rank(dataset, ranks, 8, bad)
    samples = np.concatenate([batch.samples[batch.counted] for rank in found for batch in rank])
    assert sorted(samples.tolist()) == [sample for sample in range(60) if sample not in (3, 59)]
    assert {each.sample for each in bad} == {3, 59} and all(each.reason and each.key for each in bad)


def test_more_ranks_than_images_are_an_error(packed: Dataset) -> None:
    with pytest.raises(MaelstreamError, match="holds 60 images for 61 ranks; start fewer"):
        next(every_image(packed, Reading(SIZE, 1.0, 1, ONE_THREAD), 0, 61, lambda bad: None))
