"""The one exception family: what is wrong, where, and what to do, in one line.

A command catches `MaelstreamError` once and exits with code 2; everything else is a bug and keeps its traceback.
"""


class MaelstreamError(Exception):
    """Something the user can put right; the message is one line for the reader of the terminal."""

    found_by_all = True
    """Whether every rank of a run finds the same, so that one rank may report it for all."""
    exit_code = 2


class DatasetError(MaelstreamError):
    """A source, a packed dataset or one of its shards is not what it must be."""


class StorageError(DatasetError):
    """A disk or store failed to answer; another attempt may succeed."""
