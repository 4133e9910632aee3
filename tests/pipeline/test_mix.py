"""Mixes: every dataset gets its share of any stretch of the stream, and the stream is exact like that of one."""

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.draws import AugmentDraws, CropConfig
from pipeline.line import Slices
from pipeline.loader import BadSample, LoaderState, PretrainLoader
from pipeline.mix import Mix, MixOrder, MixReader
from shards.dataset import Dataset
from shards.errors import MaelstreamError
from shards.reader import ShardReader
from tests.pipeline.test_loader import content, damaged_copy


@pytest.fixture
def mix(packed: Dataset, tmp_path: Path) -> Mix:
    """Two copies of 60 samples, weighted 3 to 1."""
    shutil.copytree(packed.folder, tmp_path / "copy")
    return Mix.open({packed.folder: 3, str(tmp_path / "copy"): 1})


def take(
    mix: Mix, slices: Slices, count: int, rank: int = 0, state: LoaderState | None = None, **options: object
) -> list:
    order, draws = MixOrder(mix, 5), AugmentDraws(5, CropConfig(), (32, 32))
    with PretrainLoader(mix, order, draws, (32, 32), slices, rank, 1, 2, **options) as loader:  # type: ignore[arg-type]
        if state is not None:
            loader.load_state_dict(state)
        return content(islice(loader, count))


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    start=st.integers(0, 10**11),
    length=st.integers(1, 500),
)
def test_every_dataset_has_its_share_of_any_stretch(weights: list[float], start: int, length: int) -> None:
    class Made:
        def __init__(self, size: int):
            self.size = size

        def __len__(self) -> int:
            return self.size

    made = Mix(tuple(Made(100 + n) for n in range(len(weights))), tuple(weights))  # type: ignore[misc]
    line = np.arange(start, start + length)
    _, _, samples = MixOrder(made, 1).of_line(line)
    counts = np.bincount(np.searchsorted(made.starts, samples, "right") - 1, minlength=len(weights))
    assert (np.abs(counts - length * np.array(made.parts) / 1e6) <= len(weights)).all()


def test_each_dataset_is_gone_through_in_whole_epochs(mix: Mix) -> None:
    epochs, positions, samples = MixOrder(mix, 1).of_line(np.arange(480))  # 360 of the first, 120 of the second
    for first, count in ((0, 6), (60, 2)):
        mine = (samples >= first) & (samples < first + 60)
        for epoch in range(count):
            assert sorted(samples[mine & (epochs == epoch)]) == list(range(first, first + 60))
        assert mine.sum() == 60 * count and sorted(positions[mine & (epochs == 0)]) == list(range(60))


def test_samples_are_those_of_their_datasets(mix: Mix, packed: Dataset) -> None:
    samples = np.array([0, 60, 119, 59, 61])
    alone = ShardReader(packed, check_crc=True).read(samples % 60)
    assert [d.tobytes() for d in MixReader(mix, True).read(samples)] == [d.tobytes() for d in alone]
    assert mix.label[samples].tolist() == packed.label[samples % 60].tolist()
    assert mix.path_and_key(61) == Dataset.open(mix.datasets[1].folder).path_and_key(1)


def test_a_mix_is_the_same_on_any_number_of_ranks_and_goes_on_exactly(mix: Mix) -> None:
    alone = take(mix, Slices(8, 1, 1), 20)
    for world_size in (2, 3):
        shares = [take(mix, Slices(8, world_size, 1), 20, rank) for rank in range(world_size)]
        assert sorted(row for share in shares for row in share) == sorted(alone)
    assert take(mix, Slices(8, 1, 1), 5, state={"epoch": 1, "position": 0}) == alone[120:]
    assert {sample >= 60 for sample, *_ in alone} == {True, False}


def test_a_bad_sample_is_replaced_by_one_of_its_own_dataset(packed: Dataset, tmp_path: Path) -> None:
    damaged = damaged_copy(packed, tmp_path / "damaged", b"\xff\xd8", b"GIF89a")
    mix = Mix((packed, damaged), (1.0, 1.0))
    told: list[BadSample] = []
    rows = take(mix, Slices(8, 1, 1), 15, on_bad=told.append, max_bad_share=0.02)
    assert [bad.sample for bad in told] == [67] and str(tmp_path / "damaged") in told[0].shard
    assert sum(sample >= 60 for sample, *_ in rows) == 60 and 67 not in {sample for sample, *_ in rows}


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, 1e-9)])
def test_weights_that_leave_a_dataset_out_are_refused(packed: Dataset, weights: tuple[float, float]) -> None:
    with pytest.raises(MaelstreamError, match="each must be positive"):
        Mix((packed, packed), weights)


def test_a_mix_is_not_shuffled_by_blocks(mix: Mix) -> None:
    with pytest.raises(MaelstreamError, match="cannot be shuffled by blocks"):
        MixOrder(mix, 1, "block")
