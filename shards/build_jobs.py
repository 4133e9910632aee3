"""A build, the jobs that its workers get, and the receipt that a worker writes for each shard."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields

import pyarrow as pa

from maelstream.shards.inspect import Conversion
from maelstream.shards.plan import PackOptions
from maelstream.shards.sources import Sources
from maelstream.shards.storage import WORK, Storage

_FIRST_OPTIONS = {"name", "split", "shard_bytes", "seed", "resize", "quality", "label_field"}


@dataclass(frozen=True)
class Build:
    """A build: its sources, destination and options."""

    sources: Sources
    destination: Storage
    options: PackOptions
    adopt: bool
    """Whether the shards exist already and are only indexed."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the dataset depends on.

        Options that version 0.1 did not have count only if they differ from their defaults, so its builds resume.
        """
        defaults = {option.name: option.default for option in fields(self.options)}
        options = {
            name: value
            for name, value in asdict(self.options).items()
            if name in _FIRST_OPTIONS or value != defaults[name]
        }
        text = json.dumps([options, self.adopt, self.sources.digest()])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ScanJob:
    """What a worker needs to scan one file of the sources."""

    source: Storage
    destination: Storage
    number: int
    file: str
    options: PackOptions
    adopt: bool
    """As in `Build`."""
    ground_truth: list[str] | None
    """As in `Sources` (`shards/sources.py`)."""
    attempt: int = 0
    """How many workers have died with this job."""

    @property
    def output(self) -> str:
        """File of the rows found (`shards/scan_output.py`)."""
        return f"{WORK}/scan-{self.number:06d}.arrow"

    @property
    def spool(self) -> str:
        """File that receives the images of a Parquet or Arrow file, one after another."""
        return f"{WORK}/spool-{self.number:06d}.bin"

    @property
    def spools(self) -> bool:
        """Whether the scan writes such a file."""
        return self.file.endswith((".parquet", ".arrow"))

    def done(self, work: set[str]) -> bool:
        """Whether every file that this scan writes is among `work`, the file names of the work folder."""
        written = [self.output, self.spool] if self.spools else [self.output]
        return {name.removeprefix(f"{WORK}/") for name in written} <= work


@dataclass(frozen=True)
class ShardJob:
    """What a worker needs to build or adopt one shard."""

    source: Storage
    destination: Storage
    number: int
    name: str
    """File name of the shard."""
    adopt: bool
    """Whether the shard exists already and must not change."""
    conversion: Conversion
    attempt: int = 0
    """How many workers have died with this job."""

    @property
    def receipt(self) -> str:
        """File name of the receipt. It is written last: if it exists, the shard is complete."""
        return f"{WORK}/shard-{self.number:06d}.arrow"

    @property
    def dali_index(self) -> str:
        """File name of the shard's index for DALI's own webdataset reader."""
        return f"{self.name.removesuffix('.tar')}.idx"

    def done(self, files: set[str], work: set[str]) -> bool:
        """Whether the shard is built and still there.

        `files` and `work` are the file names in the destination and in its work folder.
        """
        return {self.name, self.dali_index} <= files and self.receipt.removeprefix(f"{WORK}/") in work


@dataclass
class Receipt:
    """What a worker reports about a built shard."""

    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    formats: dict[str, int] = field(default_factory=dict)
    """Number of samples by extension."""
    quarantine: list[dict[str, str]] = field(default_factory=list)
    """`source` and `reason` of each quarantined image."""

    @classmethod
    def read(cls, destination: Storage, name: str) -> tuple["Receipt", pa.Table]:
        """Reads the receipt in file `name` and the rows of the index that it holds."""
        table = pa.ipc.open_file(pa.BufferReader(destination.read(name))).read_all()
        return cls(**json.loads(table.schema.metadata[b"receipt"])), table.replace_schema_metadata(None)
