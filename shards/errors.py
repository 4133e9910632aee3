"""The base of all errors that users can fix. Each says in one line what is wrong, where, and what to do.

A command catches `MaelstreamError` once and exits with code 2; any other exception is a bug and keeps its traceback.
"""


class MaelstreamError(Exception):
    """A problem that the user can fix; the message is one line for the terminal."""

    found_by_all = True
    """Whether every rank of a run finds the same problem, so that one rank may report it for all."""
    exit_code = 2


class DatasetError(MaelstreamError):
    """A source, a packed dataset or one of its shards is missing, damaged or invalid."""


class StorageError(DatasetError):
    """A disk or store failed to answer; another attempt may succeed."""
