"""Named ranges around the stages of the data path and of the training step, for whoever looks at them.

Where there is a GPU they are NVTX ranges, which Nsight shows; inside `observed` they are the observer's, such as
torch.profiler's. Otherwise entering one does nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

STAGES = ("storage", "read", "decode", "augment", "copy", "step", "optimizer", "comm")
"""In the order in which an image meets them."""

Observer = Callable[[str], AbstractContextManager[object]]

_NOTHING = nullcontext()


def _unobserved(name: str) -> AbstractContextManager[object]:
    return _NOTHING


_observer: Observer = torch.cuda.nvtx.range if torch.cuda.is_available() else _unobserved


def stage(name: str) -> AbstractContextManager[object]:
    """The range of a stage, to be entered around its work; from any thread."""
    return _observer(name)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, ranges are the observer's, in all threads."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before
