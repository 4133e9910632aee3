"""Errors of runs on several ranks. This module imports no torch."""

from maelstream.shards.errors import MaelstreamError


class RanksError(MaelstreamError):
    """The ranks cannot be started or joined as configured."""


class MeetingError(RanksError):
    """The ranks did not find one another; another start may succeed."""

    exit_code = 75


class LostError(MaelstreamError):
    """Another rank has ended or cannot be reached."""

    exit_code = 69


class AgreedError(MaelstreamError):
    """An error that all ranks found together, so only rank 0 prints it."""
