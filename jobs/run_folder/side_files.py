"""Files of a run that are only by-products: a damaged one costs its own content, never a resume or an overview.

A power loss, a full disk or an edit can leave zeros, half a line, an empty file, or a folder in place of a file. The
recipe, the checkpoints and the run's copies of weights (`target.safetensors`, `init.safetensors`) are not by-products.
"""

from collections.abc import Iterator
from pathlib import Path

from maelstream.jobs.checkpointing.store import NEWEST, put_aside
from maelstream.jobs.run_folder.environment import read_starts
from maelstream.jobs.run_folder.folder import RunFolder, is_logged_step, is_replaced_sample, json_lines
from maelstream.jobs.run_folder.status import read_status
from maelstream.shards.durable import atomic_write
from maelstream.shards.errors import MaelstreamError


def faults(folder: RunFolder) -> list[str]:
    """What is wrong with the side files, one line for each that is damaged; changes nothing.

    Raises:
        MaelstreamError: this user may not read a file of the run.
    """
    try:
        return [fault for _, fault in _damaged(folder)]
    except OSError as error:
        raise MaelstreamError(f"{error.filename or folder.path} cannot be read ({error.strerror})") from None


def repair(folder: RunFolder) -> list[str]:
    """Puts damaged side files aside as `NAME.bad`, keeps the good lines of logs, and returns one line for each.

    It also deletes the heartbeats of the start before. Only the process that holds the run's lock calls it, before any
    rank writes a heartbeat.
    """
    messages = []
    for path, fault in _damaged(folder):
        is_log = path in (folder.metrics, folder.quarantined) and path.is_file()
        content = path.read_bytes() if is_log else b""
        aside = put_aside(path)
        if is_log:
            is_line = is_logged_step if path == folder.metrics else is_replaced_sample
            with atomic_write(path) as file:
                file.writelines(line for line, value in json_lines(content) if value is not None and is_line(value))
        messages.append(f"{fault}; it is now {aside.name}" + (", its good lines are kept" if is_log else ""))
    for heartbeat in folder.ranks.glob("*"):
        heartbeat.unlink()
    return messages


def _damaged(folder: RunFolder) -> Iterator[tuple[Path, str]]:
    """Paths of the damaged side files, each with a line of text."""
    for path in (folder.tensorboard, folder.ranks, folder.reconstructions):
        if _exists(path) and not path.is_dir():
            yield path, f"{path} is not a folder"
    if folder.ranks.is_dir() and (odd := [path for path in folder.ranks.iterdir() if not path.is_file()]):
        yield folder.ranks, f"{folder.ranks}: {odd[0].name} is not a file"
    files = (folder.metrics, folder.quarantined, folder.status, folder.environment, folder.checkpoints.folder / NEWEST)
    for path in files:
        if _exists(path) and not path.is_file():
            yield path, f"{path} is not a file"
    for path, read in ((folder.status, read_status), (folder.environment, lambda _: read_starts(folder))):
        if path.is_file() and not read(path):
            yield path, f"{path} is damaged or from another version"
    for path, is_line in ((folder.metrics, is_logged_step), (folder.quarantined, is_replaced_sample)):
        if path.is_file():
            values = [value for _, value in json_lines(path.read_bytes())]
            if bad := sum(value is None or not is_line(value) for value in values):
                yield path, f"{path}: {bad:,} of {len(values):,} lines are damaged"


def _exists(path: Path) -> bool:
    """Whether there is anything at `path`, also a link that leads nowhere."""
    return path.is_symlink() or path.exists()
