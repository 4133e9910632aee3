"""Retries of reads from a store or disk that fails now and then."""

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

from maelstream.shards.errors import StorageError

PAUSES_S = (0.1, 0.4, 1.6, 6.4)
"""Seconds between attempts: one attempt more than there are pauses."""

T = TypeVar("T")


def retried(read: Callable[[], T]) -> T:
    """The result of `read`, which is called again after growing pauses while it raises StorageError.

    Raises:
        StorageError: every attempt failed.
    """
    for pause_s in PAUSES_S:
        with contextlib.suppress(StorageError):
            return read()
        time.sleep(pause_s)
    try:
        return read()
    except StorageError as error:
        raise StorageError(f"{error}; tried {len(PAUSES_S) + 1} times") from None
