"""Ranges of all threads reach the active profiler, and cost nothing without one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from maelstream.pipeline.tracing import trace_range, traced_with


def test_a_profiler_gets_the_ranges_of_all_threads_while_it_is_active() -> None:
    seen: list[tuple[str, str]] = []

    @contextmanager
    def make_range(name: str) -> Iterator[None]:
        seen.append(("in", name))
        yield
        seen.append(("out", name))

    def decode() -> None:
        with trace_range("decode"):
            pass

    with traced_with(make_range):
        with trace_range("read"):
            pass
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
    decode()
    assert seen == [("in", "read"), ("out", "read"), ("in", "decode"), ("out", "decode")]


def test_without_a_profiler_and_a_gpu_all_ranges_are_the_same_empty_object() -> None:
    if not torch.cuda.is_available():
        assert trace_range("read") is trace_range("step")
