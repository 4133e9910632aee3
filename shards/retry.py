"""Retries of reads from a store or disk that fails now and then."""

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

from maelstream.shards.errors import StorageError

PAUSES_S = (0.1, 0.4, 1.6, 6.4)
"""Seconds between attempts; there is one attempt more than pauses."""

T = TypeVar("T")


def read_with_retries(read: Callable[[], T]) -> T:
    """Calls `read`, again after growing pauses while it raises StorageError, and returns its result.

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
