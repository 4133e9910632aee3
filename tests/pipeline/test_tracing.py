"""Ranges reach whoever looks, from any thread, and nobody else."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from maelstream.pipeline.tracing import trace_range, traced_with


def test_an_observer_sees_the_ranges_of_all_threads_while_it_looks() -> None:
    seen: list[tuple[str, str]] = []

    @contextmanager
    def observer(name: str) -> Iterator[None]:
        seen.append(("in", name))
        yield
        seen.append(("out", name))

    def decode() -> None:
        with trace_range("decode"):
            pass

    with traced_with(observer):
        with trace_range("read"):
            pass
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
    decode()
    assert seen == [("in", "read"), ("out", "read"), ("in", "decode"), ("out", "decode")]


def test_where_nobody_looks_and_no_gpu_is_every_range_is_the_same_nothing() -> None:
    if not torch.cuda.is_available():
        assert trace_range("read") is trace_range("step")
