"""No rank outlives its launcher. To be imported before anything slow: the import sets it up.

The kernel watches the parent. Under `deepspeed` the parent is a launcher of its own that outlives the runner which the
user started and leaves the ranks running (measured, 0.19.8), so a thread watches the runner. A process that no launcher
started is left alone: `nohup maelstream pretrain` survives its shell.
"""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

ORPHANED = 71  # exit code
_PR_SET_PDEATHSIG = 1


def _parent_of(process: int) -> int:
    """0 when the process is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _end_with_launcher() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # `maelstream launch` tells its number; it may have died before the kernel was told.
    if os.getppid() != int(os.environ.get("MAELSTREAM_LAUNCHER", parent)):
        os._exit(ORPHANED)
    if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
        runner = _parent_of(parent)

        def watch() -> None:
            while _parent_of(parent) == runner:
                time.sleep(1)
            os._exit(ORPHANED)

        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
    _end_with_launcher()
