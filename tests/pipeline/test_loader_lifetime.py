"""However a script leaves a loader, its threads end, and the process with them."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, LoaderConfig
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.order import SampleOrder
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError


def loader_of(dataset: Dataset, split: BatchSplit = BatchSplit(8, 1, 1), rank: int = 0) -> ImageLoader:
    sampler = AugmentSampler(0, CropConfig(), (32, 32))
    return ImageLoader(dataset, SampleOrder(len(dataset), 0), sampler, split, rank, LoaderConfig(threads=1, prefetch=1))


SCRIPT = """
import sys
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.shards.dataset import Dataset
from tests.pipeline.test_loader_lifetime import loader_of
rank, world_size = map(int, sys.argv[2:])
loader = loader_of(Dataset.open(sys.argv[1]), BatchSplit(8, world_size, 1), rank)
for number, batch in enumerate(loader):
    if number == 3:
        print("loading", flush=True)
        """

WAYS: dict[str, str] = {
    "the end of the script": "break",
    "an exception": "raise ValueError('of the script')",
    "sys.exit in a function that still iterates": "sys.exit(3)",
    "Ctrl-C": "pass",
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_script_that_leaves_its_loader_open_ends(packed: Dataset, way: str, world_size: int) -> None:
    """Without `with` or `close`; a waiting thread once kept the process, and its GPU, for ever."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT + WAYS[way], packed.folder, str(rank), str(world_size)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "loading\n", rank.stderr
            if way == "Ctrl-C":
                rank.send_signal(signal.SIGINT)
        expected = {"the end of the script": 0, "an exception": 1, "Ctrl-C": -signal.SIGINT}.get(way, 3)
        for rank in ranks:
            _, printed = rank.communicate(timeout=60)
            assert rank.returncode == expected, printed
            assert ("ValueError: of the script" in printed) == (way == "an exception")
            # Two tracebacks or a message of a thread would show that the end was not clean.
            assert "Fatal" not in printed and "Exception in thread" not in printed
            assert printed.count("Traceback") == (way in ("an exception", "Ctrl-C"))
    finally:
        for rank in ranks:
            rank.kill()


def test_deleting_a_loader_ends_its_threads(packed: Dataset) -> None:
    gc.collect()
    before = threads()
    for _ in range(3):
        loader = loader_of(packed)
        batches = iter(loader)
        next(batches)
        del loader, batches
    gc.collect()
    assert not threads() - before


def threads() -> set[str]:
    """Ids of this process's threads, those of C++ libraries among them."""
    deadline = time.monotonic() + 10
    while True:
        found = set(os.listdir("/proc/self/task"))
        time.sleep(0.2)
        if found == set(os.listdir("/proc/self/task")) or time.monotonic() > deadline:
            return found


def test_closing_ends_the_threads_and_the_iterator_raises(packed: Dataset) -> None:
    loader = loader_of(packed)
    batches = iter(loader)
    next(batches)
    loader.close()
    loader.close()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("loader", "read-ahead", "resize"))
    ]
    with pytest.raises(MaelstreamError, match="this image loader is closed; make a new one"):
        next(batches)
    with pytest.raises(MaelstreamError, match="this image loader is closed; make a new one"):
        iter(loader)


def test_a_consumer_that_waits_is_woken_by_closing(packed: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()

    def wait(*_: object) -> object:
        waiting.set()
        time.sleep(1)
        raise MaelstreamError("read too late")

    monkeypatch.setattr("maelstream.pipeline.producer.open_sample_source", wait)
    loader, raised = loader_of(packed), []
    batches = iter(loader)

    def consume() -> None:
        try:
            next(batches)
        except MaelstreamError as error:
            raised.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    waiting.wait()
    loader.close()
    consumer.join(10)
    assert raised == ["this image loader is closed; make a new one"]


def test_a_second_iterator_is_refused(packed: Dataset) -> None:
    with loader_of(packed) as loader:
        first = next(iter(loader))
        with pytest.raises(MaelstreamError, match="has an iterator already; use that one, or make a new loader"):
            iter(loader)
        state = loader.state_dict()
    with loader_of(packed) as loader:
        loader.load_state_dict(state)
        assert not set(np.intersect1d(first.samples, next(iter(loader)).samples))
