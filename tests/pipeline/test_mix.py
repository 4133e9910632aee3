"""Mixes: every dataset has its share of any range of positions, and a mix is as exact as one dataset."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.store import SlowStorage
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, LoaderConfig, Shuffle
from maelstream.pipeline.loader import ImageLoader, LoaderState
from maelstream.pipeline.mix import Mix, MixOrder, MixReader
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.reader import ShardReader
from tests.pipeline.test_loader import content, damaged_copy


@pytest.fixture
def mix(packed: Dataset, tmp_path: Path) -> Mix:
    """Two copies of 60 samples, weighted 3 to 1."""
    shutil.copytree(packed.folder, tmp_path / "copy")
    return Mix.open({packed.folder: 3, str(tmp_path / "copy"): 1})


def take(
    mix: Mix,
    batch_split: BatchSplit,
    count: int,
    rank: int = 0,
    state: LoaderState | None = None,
    shuffle: Shuffle = "global",
    max_bad_share: float = 0.001,
    on_bad: Callable[[BadSample], None] = lambda _: None,
) -> list:
    order, sampler = MixOrder(mix, 5, shuffle), AugmentSampler(5, CropConfig(), (32, 32))
    config = LoaderConfig(threads=1, prefetch=2, max_bad_share=max_bad_share)
    with ImageLoader(mix, order, sampler, batch_split, rank, config, on_bad=on_bad) as loader:
        if state is not None:
            loader.load_state_dict(state)
        return content(islice(loader, count))


@dataclass(frozen=True)
class SizedDataset:
    """A dataset that has only a size."""

    size: int

    def __len__(self) -> int:
        return self.size


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    start=st.integers(0, 10**11),
    length=st.integers(1, 500),
)
def test_every_dataset_has_its_share_of_any_range_of_positions(weights: list[float], start: int, length: int) -> None:
    mix = Mix(tuple(SizedDataset(100 + n) for n in range(len(weights))), tuple(weights))  # type: ignore[misc]
    global_positions = np.arange(start, start + length)
    _, _, samples = MixOrder(mix, 1).lookup(global_positions)
    counts = np.bincount(np.searchsorted(mix.starts, samples, "right") - 1, minlength=len(weights))
    assert (np.abs(counts - length * np.array(mix.parts) / 1e6) <= len(weights)).all()


def test_each_dataset_has_whole_epochs(mix: Mix) -> None:
    epochs, positions, samples = MixOrder(mix, 1).lookup(np.arange(480))  # 360 of the first, 120 of the second
    for first, count in ((0, 6), (60, 2)):
        own = (samples >= first) & (samples < first + 60)
        for epoch in range(count):
            assert sorted(samples[own & (epochs == epoch)]) == list(range(first, first + 60))
        assert own.sum() == 60 * count and sorted(positions[own & (epochs == 0)]) == list(range(60))


def test_samples_are_those_of_their_datasets(mix: Mix, packed: Dataset) -> None:
    samples = np.array([0, 60, 119, 59, 61])
    alone = ShardReader(packed, check_crc=True).read(samples % 60)
    assert [d.tobytes() for d in MixReader(mix, True).read(samples)] == [d.tobytes() for d in alone]
    assert mix.label[samples].tolist() == packed.label[samples % 60].tolist()
    assert mix.path_and_key(61) == Dataset.open(mix.datasets[1].folder).path_and_key(1)


def test_a_mix_is_the_same_on_any_number_of_ranks_and_resumes_exactly(mix: Mix) -> None:
    alone = take(mix, BatchSplit(8, 1, 1), 20)
    for world_size in (2, 3):
        shares = [take(mix, BatchSplit(8, world_size, 1), 20, rank) for rank in range(world_size)]
        assert sorted(row for share in shares for row in share) == sorted(alone)
    assert take(mix, BatchSplit(8, 1, 1), 5, state={"epoch": 1, "position": 0}) == alone[120:]
    assert {sample >= 60 for sample, *_ in alone} == {True, False}


def test_a_bad_sample_is_replaced_by_one_of_its_own_dataset(packed: Dataset, tmp_path: Path) -> None:
    damaged = damaged_copy(packed, tmp_path / "damaged", b"\xff\xd8", b"GIF89a")
    mix = Mix((packed, damaged), (1.0, 1.0))
    reported: list[BadSample] = []
    rows = take(mix, BatchSplit(8, 1, 1), 15, on_bad=reported.append, max_bad_share=0.02)
    assert [bad.sample for bad in reported] == [67] and str(tmp_path / "damaged") in reported[0].shard
    assert sum(sample >= 60 for sample, *_ in rows) == 60 and 67 not in {sample for sample, *_ in rows}


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, 1e-9)])
def test_weights_that_leave_out_a_dataset_are_rejected(packed: Dataset, weights: tuple[float, float]) -> None:
    with pytest.raises(MaelstreamError, match="each must be positive"):
        Mix((packed, packed), weights)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_mix_shuffled_by_blocks_delivers_its_order(mix: Mix, world_size: int) -> None:
    """Images come from superblocks of each dataset, and equal those of any other order."""
    batch_split, order = BatchSplit(8, world_size, 1), MixOrder(mix, 5, "block")
    shares = [take(mix, batch_split, 15, rank, shuffle="block") for rank in range(world_size)]
    rows = sorted(row for share in shares for row in share)
    epochs, _, samples = order.lookup(np.arange(120))
    assert [row[:2] for row in rows] == sorted(zip(samples.tolist(), epochs.tolist(), strict=True))
    images = {row[:2]: row for row in take(mix, BatchSplit(8, 1, 1), 40)}
    assert all(images.get(row[:2], row) == row for row in rows) and len(images.keys() & {r[:2] for r in rows}) > 60
    resumed = take(mix, BatchSplit(8, 1, 1), 5, state={"epoch": 0, "position": 80}, shuffle="block")
    assert sorted(resumed) == sorted(row for row in rows if row[:2] in {r[:2] for r in resumed}) and len(resumed) == 40


def test_a_block_shuffle_of_a_mix_is_the_same_from_object_stores_as_from_disks(packed: Dataset) -> None:
    stores = [SlowStorage.over(packed, delay_s=0) for _ in range(2)]
    remote = Mix(tuple(map(Dataset.open_storage, stores)), (3.0, 1.0))
    rows = take(remote, BatchSplit(60, 1, 1), 3, shuffle="block")
    assert rows == take(Mix((packed, packed), (3.0, 1.0)), BatchSplit(60, 1, 1), 3, shuffle="block")
    assert all(store.requests[0] for store in stores)


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5), start=st.integers(0, 10**11))
def test_mix_positions_is_the_inverse_of_lookup(weights: list[float], start: int) -> None:
    mix = Mix(tuple(SizedDataset(100 + n) for n in range(len(weights))), tuple(weights))  # type: ignore[misc]
    order, global_positions = MixOrder(mix, 1), np.arange(start, start + 200)
    epochs, positions, samples = order.lookup(global_positions)
    for number, (indices, _) in enumerate(mix.split(samples)):
        dataset_positions = epochs[indices] * (100 + number) + positions[indices]
        assert np.array_equal(order.mix_positions(number, dataset_positions), global_positions[indices])
