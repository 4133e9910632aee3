"""Decodes one image with DALI, as a run does, and compares it with PIL's picture.

DALI is imported only when an image needs it, because that takes half a second and 100 MB per process. jaxtyping is not
imported for the shapes in signatures: it would add 50 ms to the start of each worker.
"""

import re
import threading

import numpy as np

_LEVELS = 2  # mean difference from PIL's picture that is allowed, of 255
_BAND_PIXELS = 2**20


class DaliDecodeError(Exception):
    """DALI cannot decode an image, or decodes another picture than PIL; the message is the reason."""


def check_dali_decodes(data: bytes, picture: np.ndarray) -> None:
    """Raises DaliDecodeError unless DALI decodes `data` to `picture`, to within 2 levels per channel on average.

    `picture` is uint8 (h, w, 3), RGB.

    The batch has one image: DALI then raises where a batch of 32 or more can end the process.
    """
    if not hasattr(_threads, "decoder"):
        _threads.decoder = _Decoder()
    try:
        decoded = _threads.decoder.decode(data, picture.shape[1], picture.shape[0])
    except RuntimeError as error:
        del _threads.decoder  # cannot be used after an error
        raise DaliDecodeError(f"DALI cannot decode it{_reason(str(error))}") from None
    if decoded.shape != picture.shape:
        raise DaliDecodeError(f"DALI decodes it to an image of shape {decoded.shape}, PIL to {picture.shape}")
    if (levels := _mean_difference(decoded, picture)) > _LEVELS:
        raise DaliDecodeError(f"DALI decodes it to another picture than PIL: {levels:.1f} levels apart on average")


_threads = threading.local()


class _Decoder:
    """A DALI pipeline for one image, with the operator that runs use on the CPU (`pipeline/dali_graph.py`)."""

    def __init__(self) -> None:
        from nvidia.dali import Pipeline, fn, types

        self._input: tuple[np.ndarray, ...] = ()
        self._pipeline = Pipeline(1, 1, None, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)
        with self._pipeline:
            encoded, shape = fn.external_source(self._feed, num_outputs=2)
            start = np.zeros(2, np.int32)
            decoded = fn.decoders.image_slice(
                encoded, start=start, shape=shape, axis_names="WH", output_type=types.RGB, adjust_orientation=False
            )
            self._pipeline.set_outputs(decoded)
        self._pipeline.build()

    def _feed(self) -> list[list[np.ndarray]]:
        return [[value] for value in self._input]

    def decode(self, data: bytes, width: int, height: int) -> np.ndarray:
        self._input = np.frombuffer(data, np.uint8), np.array([width, height], np.int32)
        (decoded,) = self._pipeline.run()
        return np.asarray(decoded[0])


def _mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    rows, total = max(1, _BAND_PIXELS // a.shape[1]), 0
    for top in range(0, len(a), rows):
        total += int(np.abs(a[top : top + rows].astype(np.int16) - b[top : top + rows]).sum(dtype=np.int64))
    return total / a.size


def _reason(message: str) -> str:
    """What DALI's message says about the image, in parentheses; empty if it only says that decoding failed."""
    found = re.search(r"encountered:(.*?)(?:Current pipeline object|$)", message, re.DOTALL)
    reason = " ".join((found[1] if found else message).split())
    says_nothing = not reason or reason.startswith(("Failed to decode sample", "nvImageCodec failure: '#"))
    return "" if says_nothing else f" ({reason[:200]})"
