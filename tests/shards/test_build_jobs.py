"""Builds that an older version began still resume: their fingerprints and their scans' files keep their meaning."""

import io
import json
from dataclasses import replace

import pyarrow as pa
import pytest

from maelstream.shards.build_jobs import Build
from maelstream.shards.plan import PackOptions
from maelstream.shards.scan_output import ROWS, Facts, Row, read_facts, read_rows, write_output
from maelstream.shards.sources import FILES, Sources
from maelstream.shards.storage import Storage

HERE = Storage.at(".")
IMAGES = pa.table([["a/1.jpg", "b/2.jpg"], [3, 4], ["a", "b"]], schema=FILES)
FOLDERS = Build(Sources(HERE, "folders", IMAGES, ["a", "b"]), HERE, PackOptions("images", "train", 2**28, 0), False)
TARS = Build(Sources(HERE, "tars", IMAGES, None), HERE, PackOptions("x", "val", 1000, 3, 64, 80, "kind"), True)


def test_fingerprints_are_those_of_version_0_1() -> None:
    """Computed by commit c1bd981, before there were options for images and labels."""
    assert FOLDERS.fingerprint == "cc4a4ea4615fc86a3ed27b77a8d9b9a44ce44c3968999235bad7e75e8bede4fb"
    assert TARS.fingerprint == "6690d20d7972804eb54fefb417ff79ab5fcc2f6d218420da1d7a400b0afa8d92"


@pytest.mark.parametrize("change", [{"image_field": "png"}, {"labels": False}, {"reencode": True}, {"seed": 1}])
def test_every_option_that_is_given_changes_the_fingerprint(change: dict) -> None:
    assert replace(FOLDERS, options=replace(FOLDERS.options, **change)).fingerprint != FOLDERS.fingerprint


def test_facts_of_a_scan_are_read_as_written_now_and_by_version_0_1() -> None:
    row = Row("a.tar", "a.tar/0.jpg", 512, 3, "7")
    facts = Facts(classes=["cat"], only_images=True, choices={"samples hold several images": [2, "a.tar/0"]})
    new, old = io.BytesIO(), io.BytesIO()
    assert write_output(new, iter([row]), facts) == 1
    schema = ROWS.with_metadata({"facts": json.dumps({"classes": ["cat"], "named": True})})
    with pa.ipc.new_file(old, schema) as writer:
        writer.write_table(pa.Table.from_pylist([row._asdict()], schema))
    opened = [pa.ipc.open_file(file.getvalue()) for file in (new, old)]
    assert read_facts(opened[0]) == facts
    assert read_facts(opened[1]) == Facts(classes=["cat"], named=True, field_found=True)
    assert [line for table in read_rows(opened) for line in table.to_pylist()] == [row._asdict()] * 2
