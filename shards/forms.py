"""Reads the structure of JPEG and PNG files, to find those that DALI is known to decode to PIL's picture.

DALI's parsers (nvImageCodec) are stricter than libjpeg, libpng and PIL, and one image that makes DALI raise can end the
process. For files of a proven form, DALI's result follows from the structure alone: `tests/shards/test_forms.py`
compares thousands of them, sound and damaged, with PIL. `shards/inspect.py` decodes all other files with DALI.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_MAX_SCANS = 100  # DALI raises on a progressive JPEG of more than 256
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_HIERARCHICAL = {0xC5, 0xC6, 0xCD, 0xCE}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; these three are not frames: DHT, JPG, DAC
_PIECE_BYTES = 2**20
_MAX_SIDE = 1_000_000  # DALI raises on a PNG with a longer side
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"pHYs", b"tIME", b"tEXt"}
_CHANNELS = {0: 1, 2: 3, 6: 4}  # of PNG's colour types gray, RGB and RGB with alpha


@dataclass(frozen=True)
class JpegFrame:
    """The frame header of a JPEG and the offset of its first scan (ITU T.81, B.2.2)."""

    marker: int
    bits: int
    width: int
    height: int
    sampling: tuple[tuple[int, int], ...]
    """Horizontal and vertical sampling factor of each component."""
    scan: int

    @property
    def refusal(self) -> str | None:
        """Why no later stage decodes this kind of JPEG, or None.

        It must reach no decoder: the scaled decode of libjpeg-turbo corrupts memory on a lossless JPEG.
        """
        number = self.marker - 0xC0
        if self.marker in _LOSSLESS:
            return f"a lossless JPEG (SOF{number}), which DALI does not decode"
        if self.marker in _HIERARCHICAL:
            return f"a hierarchical JPEG (SOF{number}), which DALI does not decode"
        if self.bits != 8:
            return f"a JPEG of {self.bits} bits per channel, which DALI does not decode"
        return None


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """The frame header; None if `data` is not a JPEG, or not exactly one sound frame header precedes the first scan."""
    frames: list[tuple[int, int, int, int, tuple[tuple[int, int], ...]]] = []
    offset = 2 if data[:2] == b"\xff\xd8" else len(data)
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # a fill byte
            offset += 1
            continue
        if marker == 0xDA:  # the first scan
            return JpegFrame(*frames[0], offset) if len(frames) == 1 else None
        size = data[offset + 2] << 8 | data[offset + 3]
        body = data[offset + 4 : offset + 2 + size]
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or size < 2 or len(body) < size - 2:
            return None
        if marker == 0xE1 and body[:6] == b"Exif\0\0" and size < 16:
            return None
        if marker in _FRAMES:
            if len(body) < 6 or len(body) != 6 + 3 * body[5]:
                return None
            bits, height, width, count = struct.unpack_from(">BHHB", body)
            sampling = tuple((factors >> 4, factors & 15) for factors in body[7::3][:count])
            frames.append((marker, bits, width, height, sampling))
        offset += 2 + size
    return None


def is_proven_jpeg(frame: JpegFrame, data: bytes) -> bool:
    """Whether DALI decodes this JPEG to PIL's picture if libjpeg decodes it in full without a warning."""
    if frame.marker not in (0xC0, 0xC1, 0xC2) or frame.bits != 8 or not frame.width or not frame.height:
        return False
    if frame.marker == 0xC2 and data.count(b"\xff\xda", frame.scan) > _MAX_SCANS:
        return False
    if len(frame.sampling) == 1:
        return frame.sampling[0] in _LUMA
    return len(frame.sampling) == 3 and frame.sampling[0] in _LUMA and frame.sampling[1:] == ((1, 1), (1, 1))


_LUMA = {(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)}  # 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1


@dataclass(frozen=True)
class PngHeader:
    """Fields of a PNG's first chunk, IHDR (PNG specification, 11.2.2)."""

    width: int
    height: int
    bits: int
    colour_type: int
    interlaced: int


def png_header(data: bytes) -> PngHeader | None:
    """The header; None if `data` is not a PNG."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[8:16] != b"\0\0\0\x0dIHDR" or len(data) < 33:
        return None
    width, height, bits, colour_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    return PngHeader(width, height, bits, colour_type, interlaced)


def is_proven_png(header: PngHeader, data: bytes) -> bool:
    """Whether this PNG is sound and of a form that DALI decodes to PIL's picture.

    The pixels are decompressed in pieces, and the filter byte of each row is checked; nothing else can fail in them.
    """
    channels = _CHANNELS.get(header.colour_type)
    if channels is None or header.bits != 8 or header.interlaced or not header.width or not header.height:
        return False
    if data[26:28] != b"\0\0" or max(header.width, header.height) > _MAX_SIDE:
        return False
    chunks = list(_png_chunks(data))
    kinds = [kind for kind, _, _ in chunks]
    if not kinds or kinds[0] != b"IHDR" or kinds[-1] != b"IEND" or set(kinds) - _PLAIN_CHUNKS:
        return False
    first, count = (kinds.index(b"IDAT"), kinds.count(b"IDAT")) if b"IDAT" in kinds else (0, 0)
    together = kinds[first : first + count] == [b"IDAT"] * count
    if not count or not together or kinds.count(b"IHDR") > 1 or kinds.count(b"IEND") > 1:
        return False
    row = 1 + header.width * channels
    pixels, position, whole = zlib.decompressobj(), 0, row * header.height
    try:
        for _, start, size in chunks[first : first + count]:
            rest = data[start : start + size]
            while rest:
                piece = pixels.decompress(rest, _PIECE_BYTES)
                rest = pixels.unconsumed_tail
                filters = np.frombuffer(piece, np.uint8)[-position % row :: row]
                position += len(piece)
                if position > whole or (filters > 4).any():
                    return False
                if not piece and not rest and pixels.eof:
                    break
    except zlib.error:
        return False
    return pixels.eof and not pixels.unused_data and position == whole


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields type, offset and size of each chunk's data up to the end of the file; nothing more after a wrong CRC.

    The caller sees damage, or bytes after the last chunk, by the last type, which is then not IEND.
    """
    offset = 8
    while offset < len(data):
        if offset + 12 > len(data):
            yield b"", offset, 0
            return
        size, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 8 + size
        if end + 4 > len(data) or zlib.crc32(data[offset + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            yield b"", offset, 0
            return
        yield kind, offset + 8, size
        offset = end + 4


def is_animated_png(data: bytes) -> bool:
    """Whether a PNG has the chunk acTL of animations. On some, DALI crashes even with a batch of one image."""
    offset = 8
    while png_header(data) is not None and offset + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        if kind == b"acTL":
            return True
        offset += 12 + size
    return False


def without_text(data: bytes) -> bytes:
    """A PNG without its text, ICC and EXIF chunks; other files as they are.

    PIL raises on such a chunk that decompresses to more than 1 MiB, although it has no part in the picture.
    """
    if png_header(data) is None:
        return data
    kept, offset = [data[:8]], 8
    while offset + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + size
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"):
            kept.append(data[offset:end])
        offset = end
    return b"".join([*kept, data[offset:]]) if offset <= len(data) else data
