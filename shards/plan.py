"""Which sample goes into which shard: a pure function of the sources and the options.

Any worker, on any machine, at any restart, computes the same plan, so shards can be built in any order and by anybody.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import accumulate

from shards.sources import Source, SourceTree


@dataclass(frozen=True)
class PackOptions:
    """What the bytes of a packed dataset depend on, beside its sources."""

    name: str
    split: str
    shard_bytes: int
    seed: int


@dataclass(frozen=True)
class Plan:
    options: PackOptions
    classes: list[str]
    shards: list[list[Source]]
    first_keys: list[int]
    """Number of each shard's first sample. A sample's key is its place in the whole plan, so that no shard needs to
    know what was left out of the ones before it."""

    def shard_name(self, number: int) -> str:
        return f"{self.options.name}-{self.options.split}-{number:06d}.tar"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the bytes depend on."""
        text = json.dumps([asdict(self.options), self.classes, [[asdict(s) for s in shard] for shard in self.shards]])
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(tree: SourceTree, options: PackOptions) -> Plan:
    """Shuffles the sources by a keyed hash and cuts them into shards of about `options.shard_bytes`."""
    shuffled = sorted(tree.sources, key=lambda source: _shuffle_key(options.seed, source.path))
    shards: list[list[Source]] = []
    filled = options.shard_bytes
    for source in shuffled:
        if filled >= options.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += source.size + 1536  # two tar headers and the label's block
    return Plan(options, tree.classes, shards, list(accumulate(map(len, shards[:-1]), initial=0)))


def _shuffle_key(seed: int, path: str) -> bytes:
    return hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=16, key=str(seed).encode()).digest()
