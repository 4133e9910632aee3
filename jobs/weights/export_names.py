"""Names that `maelstream export` and the readers of its folders share; without torch, for the command line."""

from typing import Literal

Format = Literal["reference", "timm", "hf"]
"""The library whose format an export has."""
EXPORT_NAME = "export.json"
"""A file in every folder that `maelstream export` writes: the format, the step and the model's configuration."""
