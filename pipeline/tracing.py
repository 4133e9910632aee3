"""Named ranges around the stages of the data path and of the training step, for profilers.

With a GPU they are NVTX ranges, which Nsight shows. Inside `traced_with` they are the ranges of another profiler, such
as torch.profiler. Otherwise a range does nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

RangeFactory = Callable[[str], AbstractContextManager[object]]
"""Makes a profiler's range of a name, as `torch.profiler.record_function` does."""

_NO_RANGE = nullcontext()


def _no_range(name: str) -> AbstractContextManager[object]:
    return _NO_RANGE


_make_range: RangeFactory = torch.cuda.nvtx.range if torch.cuda.is_available() else _no_range


def trace_range(name: str) -> AbstractContextManager[object]:
    """The profiler's range of a stage: enter it around the stage's work, in any thread."""
    return _make_range(name)


@contextmanager
def traced_with(make_range: RangeFactory) -> Iterator[None]:
    """Makes the ranges of all threads with `make_range` until the block ends."""
    global _make_range
    before, _make_range = _make_range, make_range
    try:
        yield
    finally:
        _make_range = before
