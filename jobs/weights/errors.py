"""The error of weights that cannot be read."""

from maelstream.shards.errors import MaelstreamError


class WeightsError(MaelstreamError):
    """Weights that cannot be read, or that do not fit the requested model."""
