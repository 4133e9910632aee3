"""Streams from a server on loopback, a pipe and a disk: one pass per epoch, resume by shard."""

import http.server
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maelstream.jobs.command import run
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, LoaderConfig, Shuffle
from maelstream.pipeline.loader import ImageLoader, LoaderState
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.producer import Batch
from maelstream.pipeline.sample_source import BadSample
from maelstream.pipeline.stream import Stream
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import DatasetError, MaelstreamError, StorageError
from maelstream.shards.reader import ShardReader
from tests.pipeline.test_loader import DAMAGE, content, damaged_copy
from tests.shards.test_sources import write_tar


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; the first `failures` requests for each file get only its first half."""

    def __init__(self, folder: Path, failures: int):
        self.folder, self.failures, self.requests = folder, failures, Counter[str]()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.folder / self.path.strip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        self.server.requests[path.name] += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.server.requests[path.name] <= self.server.failures else data)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@pytest.fixture
def serve() -> Iterator[Any]:
    """`serve(folder, failures)` starts a server of that folder and returns its URL."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset needs curl for http, and curl is not installed")
    servers: list[Server] = []

    def start(folder: Path | str, failures: int = 0) -> str:
        servers.append(Server(Path(folder), failures))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def pattern(dataset: Dataset) -> str:
    """Names of a packed dataset's shards as one pattern with braces."""
    stem = dataset.shard_names[0].removesuffix("000000.tar")
    return f"{stem}{{000000..{len(dataset.shard_names) - 1:06d}}}.tar"


def take(
    stream: Stream,
    batch_split: BatchSplit,
    count: int,
    rank: int = 0,
    state: LoaderState | None = None,
    shuffle: Shuffle = "global",
    max_bad_share: float = 0.001,
    on_bad: Callable[[BadSample], None] = lambda _: None,
) -> list[Batch]:
    order, sampler = SampleOrder(len(stream.shards), 5, shuffle), AugmentSampler(5, CropConfig(), (32, 32))
    config = LoaderConfig(threads=1, prefetch=2, max_bad_share=max_bad_share)
    with ImageLoader(stream, order, sampler, batch_split, rank, config, on_bad=on_bad) as loader:
        if state is not None:
            loader.load_state_dict(state)
        return list(islice(loader, count))


def test_a_server_a_pipe_and_a_disk_give_the_same_stream(packed: Dataset, serve: Any) -> None:
    names = pattern(packed)
    streams = [f"{serve(packed.folder)}/{names}", f"pipe:cat {packed.folder}/{names}", f"{packed.folder}/{names}"]
    first, *others = ([*content(take(Stream(urls, 60), BatchSplit(8, 1, 1), 15))] for urls in streams)
    assert len(first) == 120 and all(other == first for other in others)


def test_every_sample_comes_once_per_epoch_and_each_epoch_has_another_order(packed: Dataset, serve: Any) -> None:
    stream = Stream(f"{serve(packed.folder)}/{pattern(packed)}", 60, shuffle_buffer=1)
    rows = content(take(stream, BatchSplit(60, 1, 1), 2))
    passes = [[sample for sample, epoch, *_ in rows if epoch == number] for number in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1]) and len(set(passes[0])) == 60 and passes[0] != passes[1]
    labels = dict(Counter(label for *_, label in rows))
    assert labels == dict.fromkeys(range(3), 40)


def test_the_shuffle_buffer_changes_the_order_and_loses_nothing(packed: Dataset) -> None:
    in_order, shuffled = (
        content(take(Stream(f"{packed.folder}/{pattern(packed)}", 60, buffer), BatchSplit(30, 1, 1), 6))
        for buffer in (1, 16)
    )
    assert [row[:2] for row in in_order] != [row[:2] for row in shuffled]
    assert len({row[:2] for row in shuffled}) == 180 and len(set(in_order) - set(shuffled)) <= 16


def test_images_are_those_of_the_indexed_dataset(packed: Dataset) -> None:
    """Centre crops, because random crops depend on sample numbers, which differ."""
    centre = AugmentSampler(5, CropConfig("none"), (32, 32))
    stream = Stream(f"{packed.folder}/{pattern(packed)}", 60, shuffle_buffer=1)
    found = []
    for data, order in ((stream, SampleOrder(len(stream.shards), 5)), (packed, SampleOrder(60, 5))):
        with ImageLoader(data, order, centre, BatchSplit(60, 1, 1), config=LoaderConfig(1, 2)) as loader:
            found.append(sorted((image, label) for _, _, image, _, label in content(islice(loader, 1))))
    assert found[0] == found[1]


def test_ranks_take_shards_in_turn(packed: Dataset) -> None:
    """One rank reads each shard once per epoch; consecutive micro-batches continue the rank's stream."""
    stream = Stream(f"{packed.folder}/{pattern(packed)}", 60, shuffle_buffer=1)
    alone = take(stream, BatchSplit(6, 1, 1), 10, shuffle="none")
    assert [row[0] for row in content(alone)] == sorted(row[0] for row in content(alone))
    shares = [{row[0] >> 32 for row in content(take(stream, BatchSplit(6, 2, 1), 8, rank))} for rank in (0, 1)]
    assert shares[0] and shares[1]
    halves = [take(stream, BatchSplit(6, 1, micro_batches), 6 * micro_batches) for micro_batches in (1, 2)]
    assert content(halves[0]) == content(halves[1])


def test_a_stream_is_reproducible(packed: Dataset) -> None:
    stream = Stream(f"{packed.folder}/{pattern(packed)}", 60, shuffle_buffer=16)
    assert content(take(stream, BatchSplit(8, 1, 1), 9)) == content(take(stream, BatchSplit(8, 1, 1), 9))


def test_a_resumed_stream_begins_with_the_shard_of_its_position(packed: Dataset) -> None:
    stream = Stream(f"{packed.folder}/{pattern(packed)}", 60, shuffle_buffer=1)
    shards, order = len(stream.shards), SampleOrder(len(stream.shards), 5)
    resumed = content(take(stream, BatchSplit(6, 1, 1), 4, state={"epoch": 3, "position": 30}))
    expected = order.at(np.array([3]), np.array([shards // 2]))
    assert resumed[0][:2] == (int(expected[0]) << 32, 3)


def test_a_truncated_download_is_repeated_and_no_sample_comes_twice(
    packed: Dataset, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maelstream.shards.retry.PAUSES_S", (0.001,) * 4)
    urls = f"{serve(packed.folder, failures=2)}/{pattern(packed)}"
    whole = Stream(f"{packed.folder}/{pattern(packed)}", 60)
    assert content(take(Stream(urls, 60), BatchSplit(8, 1, 1), 9)) == content(take(whole, BatchSplit(8, 1, 1), 9))


@pytest.mark.parametrize("failures", [0, 9])
def test_an_unreadable_shard_is_named(
    packed: Dataset, serve: Any, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    monkeypatch.setattr("maelstream.shards.retry.PAUSES_S", (0.001,) * 4)
    url = f"{serve(packed.folder, failures)}/{'nowhere.tar' if not failures else packed.shard_names[0]}"
    with pytest.raises(StorageError, match=rf"{url} cannot be read \(.+\); tried 5 times"):
        take(Stream(url, 60), BatchSplit(8, 1, 1), 1)


@pytest.mark.parametrize(("marker", "data"), [*DAMAGE[:2], *DAMAGE[3:]])  # DAMAGE[2] still decodes in full
def test_a_bad_sample_is_reported_and_left_out(packed: Dataset, tmp_path: Path, marker: bytes, data: bytes) -> None:
    damaged = damaged_copy(packed, tmp_path / "damaged", marker, data)
    reported: list[BadSample] = []
    stream = Stream(f"{damaged.folder}/{pattern(packed)}", 60)
    rows = content(take(stream, BatchSplit(8, 1, 1), 15, max_bad_share=0.02, on_bad=reported.append))
    (bad,) = reported
    assert bad.key == packed.keys(np.array([7]))[0] and bad.shard.endswith(".tar")
    assert len(rows) == 120 and bad.sample not in {row[0] for row in rows}
    with pytest.raises(DatasetError, match="1 bad samples, max_bad_share allows 0"):
        take(stream, BatchSplit(8, 1, 1), 15, max_bad_share=0.0)


def test_joined_tars_are_read_to_the_end_and_a_damaged_header_is_an_error(
    packed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maelstream.shards.retry.PAUSES_S", (0.001,) * 4)
    tars = [(Path(packed.folder) / name).read_bytes() for name in packed.shard_names]
    (tmp_path / "joined.tar").write_bytes(b"".join(tars))
    rows = content(take(Stream(str(tmp_path / "joined.tar"), 60, shuffle_buffer=1), BatchSplit(60, 1, 1), 1))
    assert len({row[0] for row in rows}) == 60
    second = packed.keys(np.arange(60))[1].encode()  # webdataset would read one sample and no more
    (tmp_path / "damaged.tar").write_bytes(tars[0].replace(second + b".jpg", b"\xff" + second[1:] + b".jpg", 1))
    with pytest.raises(StorageError, match=r"damaged\.tar cannot be read \(it is damaged at byte [\d,]+\)"):
        take(Stream(str(tmp_path / "damaged.tar"), 60), BatchSplit(8, 1, 1), 1)


def test_the_image_of_a_stream_is_chosen_as_by_pack(packed: Dataset, tmp_path: Path) -> None:
    images = ShardReader(packed, check_crc=True).read(np.arange(5))
    one, two, three, four, five = (image.tobytes() for image in images)
    members = [("a.png", five), ("a.jpg", one), ("b.rgb.jpg", two), ("__MACOSX/._b.jpg", b"x"), ("._b.jpg", b"x")]
    members += [("c.jpg", three), ("d.left.jpg", four), ("d.right.jpg", five), ("e.jpg", four), ("f.txt", b"x")]
    write_tar(tmp_path / "some.tar", members)
    bad: list[BadSample] = []
    stream = Stream(str(tmp_path / "some.tar"), 4, shuffle_buffer=1)
    rows = content(take(stream, BatchSplit(4, 1, 1), 1, max_bad_share=0.5, on_bad=bad.append))
    assert [row[0] for row in rows] == [0, 1, 2, 4]
    assert bad[0].key == "d" and "several images (left.jpg, right.jpg)" in bad[0].reason


def test_labels_come_from_cls_or_json_and_are_minus_1_otherwise(packed: Dataset, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in sorted(Path(packed.folder).parent.glob("images/*/*.jpg"))[:4]]
    members = []
    kinds = [("cls", b"7"), ("json", json.dumps({"label": 5.0}).encode()), ("cls", b"cat"), ("txt", b"a picture")]
    for number, (image, (extension, label)) in enumerate(zip(images, kinds, strict=True)):
        members += [(f"{number}.jpg", image), (f"{number}.{extension}", label)]
    write_tar(tmp_path / "some.tar", members)
    (batch,) = take(Stream(str(tmp_path / "some.tar"), 4, shuffle_buffer=1), BatchSplit(4, 1, 1), 1)
    assert batch.labels.tolist() == [7, 5, -1, -1]


def test_a_shard_without_images_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "text.tar", [("0.txt", b"no picture")])
    with pytest.raises(StorageError, match=r"text\.tar holds no images; take it out"):
        take(Stream(str(tmp_path / "text.tar"), 4), BatchSplit(4, 1, 1), 1)


def test_the_length_of_an_epoch_is_required() -> None:
    with pytest.raises(MaelstreamError, match="samples is how many its shards hold"):
        Stream("somewhere.tar", 0)


def test_the_loader_command_streams(packed: Dataset, serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    urls = f"{serve(packed.folder)}/{pattern(packed)}"
    options = ["--samples", "60", "--seconds", "0.3", "--batch-size", "8", "--image-size", "32", "--json"]
    assert run("loader", [urls, *options]) == 0
    rates = json.loads(capsys.readouterr().out)["images_per_s"]
    assert rates.keys() == {"read", "decode and resize", "whole"} and min(rates.values()) > 0
