"""Where the data of a run is now: its recipe may name it by a path relative to the folder that the run started in."""

from pathlib import Path

from maelstream.jobs.run_folder.environment import read_starts
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.shards.dataset import MANIFEST_NAME


def located(folder: RunFolder, path: str) -> str | None:
    """A packed dataset of the run's recipe as a path from the working directory; None if a relative path is nowhere.

    A relative path is tried from the working directory of the newest start, from that of this process, and from the
    folders above the run, which help if the run was moved together with its data. URIs and absolute paths are returned
    as they are.
    """
    if "://" in path or Path(path).is_absolute():
        return path
    started_in = [Path(start.directory) for start in read_starts(folder)[-1:] if start.directory]
    for base in (*started_in, Path(), *folder.path.resolve().parents):
        if (base / path / MANIFEST_NAME).exists():
            return path if base.resolve() == Path.cwd() else str(base / path)
    return None
