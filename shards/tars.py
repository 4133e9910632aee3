"""Lists the members of a tar: their names, offsets and sizes, read header by header.

What a later reader would not see as it is stored (sparse files, links, damage) is an error that names the member.
"""

import tarfile
from collections.abc import Generator, Iterator
from typing import BinaryIO, NamedTuple

from maelstream.shards.errors import DatasetError
from maelstream.shards.layout import in_system_folder

_CHUNK_BYTES = 2**16
EXTENDED_BYTES = 2**20
"""Most bytes of a long name or of PAX fields, which tarfile reads as a whole; names have at most a few thousand."""
EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""The types of an extended header."""


class Member(NamedTuple):
    """A regular file in a tar; offset and size in bytes, offset from the start of the outermost file."""

    name: str
    offset: int
    size: int


def tar_members(file: BinaryIO, shown: str, start: int, end: int, only_one: bool = False) -> Iterator[Member]:
    """Yields the regular files of the tar at bytes `start` to `end` of `file`; the caller may seek in `file` meanwhile.

    Files of operating systems are skipped (`is_system` in `shards/layout.py`). Joined tars (`cat a.tar b.tar`) are read
    to the end, as `tar -i` does; with `only_one`, they are an error. `shown` names the tar in messages.

    Raises:
        DatasetError: the tar is damaged or truncated, or has a sparse file, a link, a device or a name that leads out
            of the folder.
    """
    position = start
    while True:
        after = yield from _members_of_one(file, shown, position, end)
        position = _end_of_zeros(file, after, end)
        # tarfile stops without an error at an invalid header, and at a truncation between two members.
        if position == after:
            raise DatasetError(f"{shown} is truncated or damaged at byte {after - start:,}; download it again")
        if position >= end:
            return
        if only_one:
            raise DatasetError(
                f"{shown} holds more after its end mark, at byte {position:,}, which webdataset and DALI do not read: "
                "joined tars, or damage; `maelstream pack` reads joined tars"
            )


def _members_of_one(file: BinaryIO, shown: str, position: int, end: int) -> Generator[Member, None, int]:
    """Yields the members up to an end mark or damage, and returns where that is."""
    try:
        file.seek(position)
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_BoundedHeader) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                if info.size < 0:  # from an extended header; the next header would be one that was read before
                    raise DatasetError(f"{shown}: member {info.name!a} has a negative size; download the tar again")
                if info.isdir() or in_system_folder(info.name):
                    continue
                _check(info, shown)
                if info.offset_data + info.size > end:
                    raise DatasetError(f"{shown} is truncated inside {info.name}; download it again")
                yield Member(info.name, info.offset_data, info.size)
            return tar.offset
    except RecursionError:  # tarfile reads the header after an extended one by a nested call
        raise DatasetError(
            f"{shown} is damaged: hundreds of extended headers follow each other; download it again"
        ) from None
    except (tarfile.TarError, ValueError, IndexError) as error:  # the last two: numbers in a damaged extended header
        raise DatasetError(f"{shown} is damaged or not a tar ({error}); download it again") from None


class _BoundedHeader(tarfile.TarInfo):
    """A member's header. tarfile reads an extended header as a whole, and a negative size leads it backwards."""

    @classmethod
    def frombuf(cls, buffer: bytes | bytearray, encoding: str, errors: str) -> "_BoundedHeader":
        info = super().frombuf(buffer, encoding, errors)
        if info.size < 0:
            raise tarfile.ReadError(f"member {info.name!a} has a negative size")
        if info.type in EXTENDED and info.size > EXTENDED_BYTES:
            raise tarfile.ReadError(f"an extended header of {info.size:,} bytes")
        return info


def _check(info: tarfile.TarInfo, shown: str) -> None:
    name = info.name
    if not info.isreg():
        raise DatasetError(f"{shown}: member {name} is a link or a device; repack the tar without it")
    if name.startswith("/") or ".." in name.split("/"):
        raise DatasetError(f"{shown}: member {name} leads out of the folder; repack the tar without it")
    if info.issparse():  # its data lack the holes, so no other reader of a shard gets its bytes
        raise DatasetError(f"{shown}: member {name} is a sparse file; unpack the tar and repack it without --sparse")


def _end_of_zeros(file: BinaryIO, position: int, end: int) -> int:
    """Where the blocks of zeros from `position` end; at least one whole block, or `position` itself."""
    file.seek(position)
    at = position
    while at < end:
        chunk = file.read(min(_CHUNK_BYTES, end - at))
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        at += zeros if zeros == len(chunk) else zeros // 512 * 512
        if zeros < len(chunk) or not chunk:
            break
    return at if at - position >= 512 else position
