"""ImageLoader: the same batches on any number of ranks, each sample once per epoch, exact resume from one number."""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.store import SlowStorage
from maelstream.jobs.pack import main as pack
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, DecodeConfig, LoaderConfig, Shuffle
from maelstream.pipeline.loader import ImageLoader, LoaderState
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.producer import Batch, Producer
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError, MaelstreamError
from maelstream.shards.reader import ShardReader
from maelstream.shards.storage import Storage
from tests.conftest import DEVICES, encoded, photograph
from tests.helpers.odd_images import bmp_with_16_bits


def loader_of(
    dataset: Dataset,
    batch_split: BatchSplit,
    rank: int = 0,
    prefetch: int = 2,
    threads: int = 1,
    shuffle: Shuffle = "global",
    decode: DecodeConfig = DecodeConfig(),
    max_bad_share: float = 0.001,
    on_bad: Callable[[BadSample], None] = lambda _: None,
) -> ImageLoader:
    order, sampler = SampleOrder(len(dataset), 5, shuffle), AugmentSampler(5, CropConfig(), (32, 32))
    config = LoaderConfig(threads, prefetch, decode, max_bad_share)
    return ImageLoader(dataset, order, sampler, batch_split, rank, config, on_bad=on_bad)


def take(
    dataset: Dataset,
    batch_split: BatchSplit,
    count: int,
    rank: int = 0,
    state: LoaderState | None = None,
    **options: Any,
) -> list[Batch]:
    with loader_of(dataset, batch_split, rank, **options) as loader:
        if state is not None:
            loader.load_state_dict(state)
        return list(islice(loader, count))


def content(batches: Iterable[Batch], pixels: bool = True) -> list[tuple]:
    """What a model gets, one row per sample: sample, epoch, pixels, mask key, label."""
    return [
        (int(sample), int(epoch), image.cpu().numpy().tobytes() if pixels else b"", int(key), int(label))
        for batch in batches
        for sample, epoch, image, key, label in zip(
            batch.samples, batch.epochs, batch.images, batch.keys, batch.labels, strict=True
        )
    ]


def global_batch(dataset: Dataset, step: int, world_size: int, micro_batches: int, batch_size: int = 8) -> list[tuple]:
    batch_split = BatchSplit(batch_size, world_size, micro_batches)
    first, last = step * micro_batches, (step + 1) * micro_batches
    return [row for rank in range(world_size) for row in content(take(dataset, batch_split, last, rank)[first:])]


@pytest.mark.parametrize("step", [0, 7])  # batch 7 contains samples of epochs 0 and 1, of 60 samples each
def test_a_batch_is_the_same_on_1_2_and_3_ranks_with_any_accumulation(packed: Dataset, step: int) -> None:
    one_rank = global_batch(packed, step, world_size=1, micro_batches=1)
    assert len({row[:2] for row in one_rank}) == 8
    for world_size, micro_batches in [(2, 1), (3, 1), (1, 3), (3, 2)]:
        assert global_batch(packed, step, world_size, micro_batches) == one_rank


@settings(max_examples=200)
@given(
    size=st.integers(1, 200),
    world_size=st.integers(1, 7),
    micro_batches=st.integers(1, 4),
    batch_size=st.integers(1, 64),
    epochs=st.integers(1, 3),
)
def test_each_sample_comes_exactly_once_per_epoch(
    size: int, world_size: int, micro_batches: int, batch_size: int, epochs: int
) -> None:
    """Samples, ranks, micro-batches and batch size need not be divisible by one another."""
    if not world_size * micro_batches <= batch_size <= size:
        return
    batch_split, order = BatchSplit(batch_size, world_size, micro_batches), SampleOrder(size, seed=1)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(-(-epochs * size // batch_size)):
        for rank in range(world_size):
            for micro_batch in range(micro_batches):
                first, end = batch_split.bounds(rank, micro_batch)
                assert 1 <= end - first <= batch_split.largest
                epoch, position = np.divmod(step * batch_size + np.arange(first, end), size)
                seen.update(zip(epoch.tolist(), order.at(epoch, position).tolist(), strict=True))
    whole_epochs = {key: count for key, count in seen.items() if key[0] < epochs}
    assert whole_epochs == {(epoch, sample): 1 for epoch in range(epochs) for sample in range(size)}


def test_the_loader_delivers_each_sample_once_per_epoch_over_3_ranks(packed: Dataset) -> None:
    batches = [
        batch for rank in range(3) for batch in take(packed, BatchSplit(8, 3, 1), 15, rank)
    ]  # 120 = 2 epochs of 60
    seen = Counter((row[1], row[0]) for row in content(batches))
    assert seen == {(epoch, sample): 1 for epoch in (0, 1) for sample in range(60)}


def test_weighted_means_of_uneven_slices_average_to_the_mean_of_the_batch(packed: Dataset) -> None:
    batches = [batch for rank in range(3) for batch in take(packed, BatchSplit(8, 3, 2), 2, rank)]
    weighted = sum(batch.samples.mean() * batch.weight for batch in batches) / len(batches)
    assert weighted == pytest.approx(np.concatenate([batch.samples for batch in batches]).mean(), rel=1e-12)
    assert {batch.weight for batch in take(packed, BatchSplit(8, 2, 2), 2)} == {1.0}


@pytest.mark.parametrize("taken", [1, 6, 13])
def test_a_restored_loader_resumes_exactly(packed: Dataset, taken: int) -> None:
    batch_split = BatchSplit(8, 1, 2)
    with loader_of(packed, batch_split) as loader:
        batches = iter(loader)
        for _ in range(2 * taken):
            next(batches)
        state = loader.state_dict()
        expected = content(islice(batches, 4))
    assert state == {"epoch": taken * 8 // 60, "position": taken * 8 % 60}
    assert content(take(packed, batch_split, 4, state=state)) == expected


def test_the_state_is_that_after_the_last_whole_global_batch(packed: Dataset) -> None:
    with loader_of(packed, BatchSplit(8, 1, 2)) as loader:
        batches = iter(loader)
        positions = []
        for _ in range(4):
            next(batches)
            positions.append(loader.state_dict()["position"])
    assert positions == [0, 8, 8, 16]


@pytest.mark.parametrize("state", [{"epoch": 0, "position": 60}, {"epoch": -1, "position": 0}])
def test_a_state_beyond_the_epoch_is_rejected(packed: Dataset, state: LoaderState) -> None:
    with pytest.raises(MaelstreamError, match="has positions 0 to 59; the state is another dataset's"):
        take(packed, BatchSplit(8, 1, 1), 1, state=state)


def test_batch_size_and_ranks_may_change_in_the_middle_of_an_epoch(packed: Dataset) -> None:
    first = [batch for rank in range(2) for batch in take(packed, BatchSplit(8, 2, 1), 3, rank)]  # 24 samples
    state: LoaderState = {"epoch": 0, "position": 24}
    rest = [batch for rank in range(3) for batch in take(packed, BatchSplit(12, 3, 1), 3, rank, state)]  # 36 samples
    assert sorted(row[0] for row in content([*first, *rest])) == list(range(60))


def test_threads_and_prefetch_change_nothing(packed: Dataset) -> None:
    with (
        loader_of(packed, BatchSplit(8, 1, 1), prefetch=1, threads=1) as one,
        loader_of(packed, BatchSplit(8, 1, 1), prefetch=7, threads=3) as other,
    ):
        assert content(islice(one, 9)) == content(islice(other, 9))


def damaged_copy(packed: Dataset, folder: Path, marker: bytes, data: bytes) -> Dataset:
    """A copy of the dataset in which `data` overwrites sample 7, from its first `marker`."""
    shutil.copytree(packed.folder, folder)
    (sample,) = ShardReader(packed, check_crc=True).read(np.array([7]))
    with (folder / packed.shard_names[packed.shard[7]]).open("r+b") as shard:
        shard.seek(int(packed.offset[7]) + sample.tobytes().index(marker))
        shard.write(data)
    return Dataset.open(folder)


DAMAGE = [
    (b"\xff\xd8", b"GIF89a"),
    (b"\xff\xd8", bytes(300)),
    (b"\xff\xd9", bytes(2)),  # as in a truncated file
    (b"\xff\xe0", bytes(300)),  # DALI 2.4 segfaults on it
    (b"\xff\xc4", b"\xff\xc4\x00\x1f" + b"\xff" * 20),  # a Huffman table; DALI raises
]
NOT_AS_PACKED = r"not the bytes that were packed \(CRC32C\)"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("marker", "data"), DAMAGE)
def test_a_bad_sample_is_reported_and_replaced_and_all_others_are_unchanged(
    packed: Dataset, tmp_path: Path, marker: bytes, data: bytes, device: str
) -> None:
    """Pixels are not compared on a GPU: which of its decoders gets an image depends on the rest of the batch."""
    decode, pixels = DecodeConfig(on="cpu" if device == "cpu" else "gpu"), device == "cpu"
    damaged = damaged_copy(packed, tmp_path / "damaged", marker, data)
    check_that_sample_7_is_replaced(damaged, packed, decode, pixels, NOT_AS_PACKED)


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_on_which_dali_raises_although_packing_checked_it_is_found_and_replaced(
    packed: Dataset, tmp_path: Path, device: str
) -> None:
    """As may happen on a GPU, whose decoders packing does not try: the index has the checksum of the damaged bytes."""
    decode, pixels = DecodeConfig(on="cpu" if device == "cpu" else "gpu"), device == "cpu"
    damaged = with_checksum_of_sample_7(damaged_copy(packed, tmp_path / "damaged", *DAMAGE[4]))
    assert damaged.dali_checked
    check_that_sample_7_is_replaced(damaged, packed, decode, pixels, "cannot be decoded|DALI cannot decode it")


@pytest.mark.parametrize("batch_size", [8, 60])  # DALI can end the process at 32 and more
def test_images_of_an_old_dataset_are_checked_before_dali_reads_them(
    packed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Version 0.1.0 packed images that PIL decodes and DALI does not, such as this BMP."""
    size = int(packed.size[7])
    bmp = bmp_with_16_bits(photograph(20, 20), (5, 5, 5))
    old = with_checksum_of_sample_7(
        damaged_copy(packed, tmp_path / "damaged", b"\xff\xd8", bmp + bytes(size - len(bmp)))
    )
    old.manifest["dali_checked"] = False
    monkeypatch.setattr(Producer, "_undecodable", None)  # for images on which DALI has raised
    reported: list[BadSample] = []
    take(old, BatchSplit(batch_size, 1, 1), 2, max_bad_share=0.02, on_bad=reported.append)
    assert {bad.sample for bad in reported} <= {7}
    assert all("DALI cannot decode it" in bad.reason for bad in reported)
    assert batch_size < 60 or len(reported) == 1


def with_checksum_of_sample_7(dataset: Dataset) -> Dataset:
    """`dataset`, with the checksum of the bytes that are now in sample 7's place."""
    (sample,) = ShardReader(dataset, check_crc=False).read(np.array([7]))
    checksums = dataset.crc32c[:].copy()
    checksums[7] = google_crc32c.value(sample)
    dataset.crc32c = checksums
    return dataset


def check_that_sample_7_is_replaced(
    damaged: Dataset, packed: Dataset, decode: DecodeConfig, pixels: bool, reason: str
) -> None:
    reported: list[BadSample] = []
    with loader_of(damaged, BatchSplit(8, 1, 1), max_bad_share=0.02, on_bad=reported.append, decode=decode) as loader:
        actual = content(islice(loader, 15), pixels)  # two epochs of 60
    undamaged = content(take(packed, BatchSplit(8, 1, 1), 15), pixels)
    assert {(bad.sample, bad.key) for bad in reported} == {(7, packed.keys(np.array([7]))[0])}
    (message,) = map(str, reported)
    assert re.search(reason, message) and damaged.shard_names[packed.shard[7]] in message
    differing = [(before, now) for before, now in zip(undamaged, actual, strict=True) if before != now]
    assert [before[:2] for before, _ in differing] == [(7, 0), (7, 1)]
    assert all(now[0] != 7 and now[1] == before[1] for before, now in differing)


@pytest.mark.parametrize(("marker", "data"), DAMAGE)
def test_every_rank_and_every_resumed_run_replaces_a_bad_sample_with_the_same_one(
    packed: Dataset, tmp_path: Path, marker: bytes, data: bytes
) -> None:
    damaged = damaged_copy(packed, tmp_path / "damaged", marker, data)
    whole = content(take(damaged, BatchSplit(8, 1, 1), 15, max_bad_share=0.02))
    for world_size in (2, 3):
        shares = [
            take(damaged, BatchSplit(8, world_size, 1), 15, rank, max_bad_share=0.02) for rank in range(world_size)
        ]
        assert [row for step in range(15) for share in shares for row in content([share[step]])] == whole
    resumed = take(damaged, BatchSplit(8, 1, 1), 12, state={"epoch": 0, "position": 24}, max_bad_share=0.02)
    assert content(resumed) == whole[24:]


def test_an_error_while_the_source_opens_reaches_the_consumer(packed: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a batch or an error in the queue, the training loop would wait forever."""

    def fail(*_: Any) -> Any:
        raise DatasetError("the store is gone")

    monkeypatch.setattr("maelstream.pipeline.producer.open_sample_source", fail)
    with pytest.raises(DatasetError, match="the store is gone"):
        take(packed, BatchSplit(8, 1, 1), 1)


def test_more_bad_samples_than_allowed_raise_an_error_that_lists_them(packed: Dataset, tmp_path: Path) -> None:
    damaged = damaged_copy(packed, tmp_path / "damaged", b"\xff\xd8", b"GIF89a")
    key = damaged.keys(np.array([7]))[0]
    with pytest.raises(
        DatasetError, match=rf"1 bad samples, max_bad_share allows 0: .*000\d\.tar: sample {key}: {NOT_AS_PACKED}"
    ):
        take(damaged, BatchSplit(60, 1, 1), 1, max_bad_share=0.0)


def test_labels_are_those_of_the_folders(packed: Dataset) -> None:
    (batch,) = take(packed, BatchSplit(60, 1, 1), 1)
    folders = [source.split("/")[0] for source in packed.sources(batch.samples)]
    assert [packed.classes[label] for label in batch.labels] == folders


def test_images_are_uint8_and_every_sample_has_its_own_mask_key(packed: Dataset) -> None:
    (batch,) = take(packed, BatchSplit(8, 1, 1), 1)
    assert batch.images.shape == (8, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.keys.dtype == torch.int64 and len(set(batch.keys.tolist())) == 8


def test_a_batch_larger_than_the_dataset_is_rejected(packed: Dataset) -> None:
    with pytest.raises(MaelstreamError, match=r"batch_size 61 is larger than the dataset: .* holds 60 samples"):
        loader_of(packed, BatchSplit(61, 1, 1))


def test_more_ranks_than_samples_are_rejected() -> None:
    with pytest.raises(MaelstreamError, match="a batch of 8 samples cannot be shared by 9 ranks"):
        BatchSplit(8, 9, 1)


# --- block shuffle and object stores


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """5,000 samples of one class, in several shards: 40 blocks, 3 superblocks."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "src" / "a").mkdir(parents=True)
    for number in range(5000):
        image = encoded(photograph(32, 32, seed=number % 50), "JPEG", comment=str(number).encode())
        (folder / "src" / "a" / f"{number}.jpg").write_bytes(image.tobytes())
    assert pack([str(folder / "src"), str(folder / "out"), "--shard-size", "1MiB", "--workers", "1"]) == 0
    return Dataset.open(folder / "out")


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_block_shuffle_delivers_its_order_on_any_number_of_ranks(many: Dataset, world_size: int) -> None:
    batch_split, steps = BatchSplit(500, world_size, 1), 11  # into the second epoch
    shares = [take(many, batch_split, steps, rank, shuffle="block") for rank in range(world_size)]
    order = SampleOrder(5000, 5, "block")
    for step in range(steps):
        epochs, positions = np.divmod(step * 500 + np.arange(500), 5000)
        samples = np.concatenate([share[step].samples for share in shares])
        assert np.array_equal(samples, order.at(epochs, positions))
    encoded_images = ShardReader(many, check_crc=True).read(shares[0][3].samples)
    decoder_input = [data.tobytes() for data in encoded_images]
    assert len(set(decoder_input)) == len(decoder_input)
    assert content(shares[0][3:5]) == content(
        take(many, batch_split, 2, 0, state={"epoch": 0, "position": 1500}, shuffle="block")
    )


def test_a_block_shuffle_of_an_object_store_makes_few_long_requests(many: Dataset) -> None:
    store = SlowStorage.over(many, delay_s=0)
    remote = Dataset.open_storage(store)
    delivered = content(take(remote, BatchSplit(500, 1, 1), 10, shuffle="block"))
    assert delivered == content(take(many, BatchSplit(500, 1, 1), 10, shuffle="block"))
    assert store.requests[0] < 100  # 40 blocks, some split by a shard's end, and a superblock of the next epoch
    store.requests[0] = 0
    assert content(take(remote, BatchSplit(500, 1, 1), 10)) == content(take(many, BatchSplit(500, 1, 1), 10))


def test_a_bad_sample_of_a_block_shuffle_is_replaced(packed: Dataset, tmp_path: Path) -> None:
    damaged = damaged_copy(packed, tmp_path / "damaged", b"\xff\xd8", b"GIF89a")
    actual = content(take(damaged, BatchSplit(8, 1, 1), 8, shuffle="block", max_bad_share=0.02))
    undamaged = content(take(packed, BatchSplit(8, 1, 1), 8, shuffle="block"))
    assert [before[0] for before, now in zip(undamaged, actual, strict=True) if before != now] == [7]


@dataclass
class FlakyFileSystem:
    """An object store, of which only one in `succeeds_every` reads of a shard succeeds."""

    files: Any
    succeeds_every: int
    reads: int = 0

    def get_file_info(self, selector: Any) -> Any:
        return self.files.get_file_info(selector)

    def open_input_file(self, path: str) -> Any:
        file = self.files.open_input_file(path)
        return SimpleNamespace(size=file.size, read_at=partial(self.read_at, file)) if path.endswith(".tar") else file

    def read_at(self, file: Any, size: int, offset: int) -> bytes:
        self.reads += 1
        if self.reads % self.succeeds_every:
            raise OSError("the store is busy")
        return file.read_at(size, offset)


def test_failed_requests_to_an_object_store_are_repeated(packed: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maelstream.shards.retry.PAUSES_S", (0.001,) * 4)

    def remote(succeeds_every: int) -> Dataset:
        files: Any = FlakyFileSystem(packed.storage.filesystem, succeeds_every)
        return Dataset.open_storage(Storage(files, packed.storage.path, packed.storage.shown))

    samples = np.array([3])
    (data,) = ShardReader(remote(3), check_crc=True).read(samples)
    assert data.tobytes() == ShardReader(packed, check_crc=True).read(samples)[0].tobytes()
    with pytest.raises(DatasetError, match=r"\.tar cannot be read \(the store is busy\); tried 5 times"):
        take(remote(10**9), BatchSplit(8, 1, 1), 1)
