"""Shards that cannot be read at random: URLs, pipes, or a WebDataset without an index.

`pipeline/stream_source.py` reads them from start to end. Only this description is imported by recipes, so it imports
neither torch nor webdataset.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import braceexpand

from maelstream.shards.braces import MAX_EXPANDED, expanded_count
from maelstream.shards.errors import MaelstreamError


@dataclass(frozen=True)
class Stream:
    """WebDataset shards that are read from start to end."""

    urls: str
    """One URL or path, or several in braces: `https://host/train-{0000..1023}.tar`, `pipe:ssh host cat {00..63}.tar`.
    curl fetches what begins with http."""
    samples: int
    """Number of samples in all shards together: the length of an epoch."""
    shuffle_buffer: int = 1000
    """Samples in the buffer from which the next one is drawn; 1: no shuffling."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.shuffle_buffer < 1:
            raise MaelstreamError(
                f"{self.urls}: samples {self.samples} and shuffle_buffer {self.shuffle_buffer} must be at least 1; "
                "samples is how many its shards hold, which is the length of an epoch"
            )
        if expanded_count(self.urls) > MAX_EXPANDED or not 0 < len(self.shards) <= MAX_EXPANDED:
            raise MaelstreamError(f"{self.urls}: expands to no shard, or to more than {MAX_EXPANDED:,}")

    @cached_property
    def shards(self) -> list[str]:
        """URLs with braces expanded.

        Raises:
            MaelstreamError: the braces are not balanced.
        """
        try:
            return list(islice(braceexpand.braceexpand(self.urls), MAX_EXPANDED + 1))
        except (ValueError, RecursionError) as error:
            raise MaelstreamError(
                f"{self.urls}: its braces cannot be expanded ({error}); write several shards as {{0000..0023}} or "
                "{a,b}, and a brace in a name as \\{"
            ) from None

    def __len__(self) -> int:
        return self.samples

    @property
    def folder(self) -> str:
        """The URLs; error messages name a dataset by this attribute."""
        return self.urls

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.urls, self.samples)).encode()).hexdigest()
