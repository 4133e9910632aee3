"""The image loader: the batches of one rank, without end; its whole state is one number.

`pipeline/batch_plan.py` decides what a batch contains, and the thread in `pipeline/producer.py` reads and decodes.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import TypedDict

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import LoaderConfig
from maelstream.pipeline.decode import decode_device
from maelstream.pipeline.mix import Mix, MixOrder
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.output import Output
from maelstream.pipeline.producer import CLOSED, Batch, Producer
from maelstream.pipeline.sample_source import BadSample, BadSamples
from maelstream.pipeline.stream import Stream
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError


class LoaderState(TypedDict):
    """How far training has come: `position` samples of `epoch` have been consumed."""

    epoch: int
    position: int


class ImageLoader:
    """Iterates without end over the micro-batches of one rank, once.

    Its threads end with the `with` block, at `close()`, when the loader is deleted, or when Python ends.
    `state_dict()` is the state after the last *whole* global batch that was delivered.
    """

    def __init__(
        self,
        dataset: Dataset | Mix | Stream,
        order: SampleOrder | MixOrder,
        augment_sampler: AugmentSampler,
        batch_split: BatchSplit,
        rank: int = 0,
        config: LoaderConfig = LoaderConfig(),
        output: Output = Output(),
        on_bad: Callable[[BadSample], None] = lambda _: None,
    ):
        """Checks the arguments; iterating opens files and starts threads.

        Args:
            order: order of the samples, or of the shards of a stream.
            augment_sampler: draws crops and masks, and has the size of the images.
            config: with `threads` 0, this process uses all its cores; set `threads` if ranks share a machine.
            output: dtype, layout and normalisation of the images. Our models take the default, bytes.
            on_bad: called once for each sample that cannot be decoded and is replaced. When this rank has found more
                of them than `config.max_bad_share` of the dataset, iterating raises a DatasetError that lists them.

        Raises:
            MaelstreamError: the dataset is smaller than a global batch.
        """
        if batch_split.batch_size > len(dataset):
            raise MaelstreamError(
                f"batch_size {batch_split.batch_size} is larger than the dataset: {dataset.folder} holds "
                f"{len(dataset)} samples; use a smaller batch_size"
            )
        self.dataset, self._order, self._augment_sampler = dataset, order, augment_sampler
        self._batch_split, self._rank = batch_split, rank
        self._config, self._output = config, output
        self._bad = BadSamples(config.max_bad_share, len(dataset), on_bad)
        self._consumed = 0
        self._closed = False
        self._finalizer: weakref.finalize | None = None

    def state_dict(self) -> LoaderState:
        epoch, position = divmod(self._consumed, len(self.dataset))
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: LoaderState) -> None:
        """Resumes from `state`, in O(1); call it before the first batch is taken.

        Raises:
            MaelstreamError: the state is that of another dataset.
        """
        if self._finalizer is not None:
            raise RuntimeError("load_state_dict must be called before the loader is iterated")
        if state["epoch"] < 0 or not 0 <= state["position"] < len(self.dataset):
            raise MaelstreamError(
                f"epoch {state['epoch']}, position {state['position']}: {self.dataset.folder} has positions 0 to "
                f"{len(self.dataset) - 1:,}; the state is another dataset's"
            )
        self._consumed = state["epoch"] * len(self.dataset) + state["position"]

    def close(self) -> None:
        """Stops the threads and frees the decoder; it is also called when the loader is deleted or Python ends."""
        self._closed = True
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> "ImageLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        """The only iterator of this loader; it starts the threads.

        Raises:
            MaelstreamError: the loader has an iterator already, or is closed.
        """
        if self._closed:
            raise MaelstreamError(CLOSED)
        if self._finalizer is not None:
            raise MaelstreamError(
                "this loader has an iterator already; use that one, or make a new loader and load this one's state"
            )
        producer = Producer(
            self.dataset,
            self._order,
            self._augment_sampler,
            self._batch_split,
            self._rank,
            self._config,
            # Not earlier: the launcher chooses the rank's GPU after the loader is constructed.
            decode_device(self._config.decode),
            self._output,
            self._bad,
            self._consumed,
        )
        self._finalizer = weakref.finalize(self, producer.close)  # which does not refer to the loader
        return self._batches(producer)

    def _batches(self, producer: Producer) -> Iterator[Batch]:
        while True:
            for _ in range(self._batch_split.micro_batches - 1):
                yield producer.take()
            batch = producer.take()
            self._consumed += self._batch_split.batch_size
            yield batch
