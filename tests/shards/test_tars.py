"""Members of a tar: joined tars are read to the end; sparse members and damage are errors that name the member."""

import io
import tarfile
from pathlib import Path

import pytest

from maelstream.shards.errors import DatasetError
from maelstream.shards.tars import Member, tar_members
from tests.shards.test_sources import tar_bytes

ONE, TWO = tar_bytes([("a.jpg", b"a" * 700), ("b.jpg", b"b")]), tar_bytes([("c.jpg", b"c" * 512)])


def read(data: bytes, only_one: bool = False) -> list[Member]:
    return list(tar_members(io.BytesIO(data), "x.tar", 0, len(data), only_one))


def names(data: bytes, only_one: bool = False) -> list[str]:
    return [member.name for member in read(data, only_one)]


def test_members_of_joined_tars_are_found_at_their_offsets() -> None:
    found = read(ONE + TWO + ONE[:2560] + bytes(1024))
    assert [member.name for member in found] == ["a.jpg", "b.jpg", "c.jpg", "a.jpg", "b.jpg"]
    data = ONE + TWO
    assert data[found[2].offset : found[2].offset + found[2].size] == b"c" * 512


@pytest.mark.parametrize("zeros", [0, 512, 20 * 512, 2**18, 100, 2**17 + 100])
def test_zeros_after_the_end_mark_are_padding(zeros: int) -> None:
    assert names(ONE + bytes(zeros), only_one=True) == ["a.jpg", "b.jpg"]
    assert len(names(ONE + bytes(zeros // 512 * 512) + TWO)) == 3


@pytest.mark.parametrize("rest", [b"x", b"<html>" * 300, bytes(2048) + b"x" * 512, TWO[:1024], TWO[:700], ONE[512:]])
def test_anything_else_after_the_end_mark_is_an_error(rest: bytes) -> None:
    with pytest.raises(DatasetError, match=r"^x\.tar (is truncated or damaged at byte|is truncated inside|is damaged)"):
        read(ONE + rest)


def test_joined_tars_are_an_error_where_only_one_is_read() -> None:
    with pytest.raises(DatasetError, match="holds more after its end mark, at byte 10,240, which webdataset and DALI"):
        read(ONE + TWO, only_one=True)


# --- sparse files, as GNU tar --sparse writes them: a file of 4,096 bytes with data at 1,024


def any_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def old_gnu() -> bytes:
    block = bytearray(any_header("0.bmp", 512, tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"00000002000\0" + b"00000001000\0"  # the first of four pairs of offset and size
    block[483:495] = b"00000010000\0"  # the real size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + b"d" * 512


def pax(records: dict[str, str], name: str, data: bytes) -> bytes:
    lines = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        size = len(line) + len(str(len(line) + 2))
        lines += str(size).encode() + line
    padded = lines.ljust(-(-len(lines) // 512) * 512, b"\0")
    return any_header("PaxHeaders/0", len(lines), tarfile.XHDTYPE) + padded + any_header(name, len(data)) + data


SIZES = {"GNU.sparse.size": "4096", "GNU.sparse.numblocks": "1"}
SPARSE = {
    "old GNU": old_gnu(),
    "PAX 0.0": pax(SIZES | {"GNU.sparse.offset": "1024", "GNU.sparse.numbytes": "512"}, "0.bmp", b"d" * 512),
    "PAX 0.1": pax(SIZES | {"GNU.sparse.map": "1024,512"}, "0.bmp", b"d" * 512),
    "PAX 1.0": pax(
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.bmp", "GNU.sparse.realsize": "4096"},
        "GNUSparseFile.1/0.bmp",
        b"1\n1024\n512\n".ljust(512, b"\0") + b"d" * 512,
    ),
}


@pytest.mark.parametrize("form", SPARSE)
def test_a_sparse_member_is_an_error_that_names_it(form: str) -> None:
    data = ONE[:2560] + SPARSE[form] + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # the test's own bytes are such a member
        assert tar.getmember("0.bmp").issparse()
    with pytest.raises(DatasetError, match=r"^x\.tar: member 0\.bmp is a sparse file; unpack the tar"):
        read(data)


def test_a_damaged_sparse_map_is_one_clear_error() -> None:
    with pytest.raises(DatasetError, match=r"^x\.tar is damaged or not a tar"):
        read(SPARSE["PAX 0.1"].replace(b"1024,512", b"1024,abc") + bytes(1024))


def test_files_of_operating_systems_are_skipped(tmp_path: Path) -> None:
    skipped = ["__MACOSX/._a.jpg", "cat/._a.jpg", ".DS_Store", "./.cache/x.jpg", "cat/Thumbs.db", "@eaDir/x.jpg"]
    assert names(tar_bytes([(name, b"x") for name in [*skipped, "./cat/a.jpg"]])) == ["./cat/a.jpg"]


def signed_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member's header with any size, also a negative one, which only GNU's form of numbers can hold."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = (size % 2**88 | (0xFF if size < 0 else 0x80) << 88).to_bytes(12)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax_size(size: int) -> bytes:
    """An extended header that gives the next member this size."""
    length = f"size={size}\n"
    record = f"{len(length) + 3} {length}".encode()
    assert len(record) == len(length) + 3
    return signed_header("pax", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0")


LONG_NAME = signed_header("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME) + b"abcd".ljust(512, b"\0")


@pytest.mark.parametrize("name", ["a.jpg", "a", ".DS_Store", "__MACOSX/a", "folder/"])
@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40)])
def test_a_negative_size_is_an_error_and_no_endless_loop(name: str, size: int) -> None:
    kind = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
    with pytest.raises(DatasetError, match=r"^x\.tar.* has a negative size"):
        read(signed_header("first.jpg", 0) + signed_header(name, size, kind) + bytes(1024))


@pytest.mark.parametrize("size", [-512, -1024])
@pytest.mark.parametrize("name", ["a", ".DS_Store"])
def test_a_negative_size_in_an_extended_header_is_an_error(name: str, size: int) -> None:
    with pytest.raises(DatasetError, match=r"^x\.tar.* has a negative size"):
        read(pax_size(size) + signed_header(name, 0) + bytes(1024))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_huge_extended_header_is_an_error_before_it_is_read(kind: bytes) -> None:
    with pytest.raises(DatasetError, match="an extended header of 1,099,511,627,776 bytes"):
        read(signed_header("a", 2**40, kind) + bytes(2048))


@pytest.mark.parametrize("repeated", [pax_size(0), LONG_NAME])
def test_endless_extended_headers_are_an_error(repeated: bytes) -> None:
    with pytest.raises(DatasetError, match="extended headers follow each other"):
        read(repeated * 3000 + signed_header("a", 0) + bytes(1024))
