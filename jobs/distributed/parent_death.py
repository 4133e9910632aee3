"""Ends a rank when its launcher ends. Importing this module sets it up; import it before anything slow.

The kernel kills a rank when its parent process ends. Under `deepspeed` the parent is a second launcher, which outlives
the runner that the user started and leaves the ranks running (measured with 0.19.8). A thread therefore watches the
runner. A process without a launcher is not affected: `nohup maelstream pretrain` survives its shell.
"""

import os

ORPHANED = 71  # exit code
_PR_SET_PDEATHSIG = 1


def _parent_of(process: int) -> int:
    """Process id of the parent; 0 if the process has ended."""
    from pathlib import Path

    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _end_with_launcher() -> None:
    import ctypes  # these imports take 10 ms, and a command without a launcher needs none of them
    import signal
    import threading
    import time
    from pathlib import Path

    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # `maelstream launch` passes its process id; it may have ended before the call above.
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
