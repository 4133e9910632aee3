"""Checks and converts the images of a job, in this process or isolated in child processes.

A decoder that crashes or hangs ends its process. The job then runs again, isolated: a child process checks a group of
images, and a group whose child dies is bisected. An image whose child dies three times is unusable.
"""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from itertools import chain
from multiprocessing.connection import Connection
from typing import TypeVar

from maelstream.shards.executors import start_worker
from maelstream.shards.inspect import Conversion, ImageInfo, UnusableImageError, convert

IMAGE_LIMIT_S = 60
"""A process that checks one image for longer ends itself."""
_ATTEMPTS = 3
_GROUP_IMAGES, _GROUP_BYTES = 64, 2**26

Key = TypeVar("Key")
Checked = tuple[bytes, ImageInfo] | str
"""The bytes to pack and what they are, or the reason why the image is unusable."""


def check_images(
    images: Iterable[tuple[Key, bytes]], conversion: Conversion, isolated: bool
) -> Iterator[tuple[Key, Checked]]:
    """Yields the result of each image, in order, with the key that came with it."""
    if not isolated:
        for key, data in images:
            yield key, _check(data, conversion)
        return
    for group in _groups(images):
        yield from zip([key for key, _ in group], _bisect([data for _, data in group], conversion), strict=True)


def _check(data: bytes, conversion: Conversion) -> Checked:
    # The signal ends the process, even inside a decoder: Python has no handler for it.
    signal.alarm(IMAGE_LIMIT_S)
    try:
        return convert(data, conversion)
    except UnusableImageError as reason:
        return str(reason)
    finally:
        signal.alarm(0)


def _groups(images: Iterable[tuple[Key, bytes]]) -> Iterator[list[tuple[Key, bytes]]]:
    group: list[tuple[Key, bytes]] = []
    for key, data in images:
        group.append((key, data))
        if len(group) == _GROUP_IMAGES or sum(len(other) for _, other in group) > _GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _bisect(images: list[bytes], conversion: Conversion) -> list[Checked]:
    """Results of `images`; halves them for as long as the child process that checks them dies."""
    for _ in range(_ATTEMPTS if len(images) == 1 else 1):
        results, exit_code = _check_in_child(images, conversion)
        if results is not None:
            return results
    if len(images) == 1:
        return [_cause(exit_code)]
    middle = len(images) // 2
    return list(chain(_bisect(images[:middle], conversion), _bisect(images[middle:], conversion)))


def _check_in_child(images: list[bytes], conversion: Conversion) -> tuple[list[Checked] | None, int]:
    """Results, or None if the child process died, and its exit code."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, images, conversion))
    process.start()
    sender.close()
    try:
        results = receiver.recv()
    except EOFError:
        results = None
    process.join()
    assert process.exitcode is not None
    return (results if process.exitcode == 0 else None), process.exitcode


def _child(sender: Connection, images: list[bytes], conversion: Conversion) -> None:
    start_worker()
    sender.send([_check(data, conversion) for data in images])


def _cause(exit_code: int) -> str:
    if exit_code == -signal.SIGALRM:
        return f"decoding it takes more than {IMAGE_LIMIT_S} s"
    if exit_code == -signal.SIGKILL:
        return "decoding it gets the process killed, perhaps because memory runs out"
    name = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    return f"decoding it ends the process ({name})"
