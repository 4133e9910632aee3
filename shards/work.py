"""What passes between a build and its workers, and what they leave in its work folder."""

import json
from dataclasses import dataclass, field

import pyarrow as pa

from maelstream.shards.storage import WORK, Storage


@dataclass(frozen=True)
class ScanJob:
    """All that a worker needs to look through one file of the sources."""

    source: Storage
    destination: Storage
    number: int
    file: str
    label_field: str | None
    """As in `maelstream.shards.plan.PackOptions`."""
    ground_truth: list[str] | None
    """As in `maelstream.shards.sources.Sources`."""

    @property
    def output(self) -> str:
        """Rows of `maelstream.shards.scan.ROWS`."""
        return f"{WORK}/scan-{self.number:06d}.arrow"

    @property
    def spool(self) -> str:
        """A Parquet file's images, one behind another."""
        return f"{WORK}/spool-{self.number:06d}.bin"

    def done(self, work: set[str]) -> bool:
        """Whether the work folder, whose file names are `work`, holds all that the scan of this file writes."""
        written = [self.output, self.spool] if self.file.endswith(".parquet") else [self.output]
        return {name.removeprefix(f"{WORK}/") for name in written} <= work


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs to build, or to adopt, one shard."""

    source: Storage
    destination: Storage
    number: int
    name: str
    """Of the shard's file."""
    adopt: bool
    """Whether the shard stands already, and no byte of it may change."""
    resize: int | None
    """As in `maelstream.shards.plan.PackOptions`."""
    quality: int

    @property
    def receipt(self) -> str:
        """Written last: where it stands, the shard is whole."""
        return f"{WORK}/shard-{self.number:06d}.arrow"

    @property
    def dali_index(self) -> str:
        """The shard's index for stock DALI."""
        return f"{self.name.removesuffix('.tar')}.idx"

    def done(self, files: set[str], work: set[str]) -> bool:
        """Whether the shard is built, and nobody took it away since, where these are the destination's file names."""
        return {self.name, self.dali_index} <= files and self.receipt.removeprefix(f"{WORK}/") in work


@dataclass
class Receipt:
    """What is known of a built shard."""

    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    formats: dict[str, int] = field(default_factory=dict)
    """Samples by extension."""
    quarantine: list[dict[str, str]] = field(default_factory=list)
    """`source` and `reason` of each image that did not enter."""

    @classmethod
    def read(cls, destination: Storage, name: str) -> tuple["Receipt", pa.Table]:
        """The receipt in file `name`, and the rows of the index that come with it."""
        table = pa.ipc.open_file(pa.BufferReader(destination.read(name))).read_all()
        return cls(**json.loads(table.schema.metadata[b"receipt"])), table.replace_schema_metadata(None)
