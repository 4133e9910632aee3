"""`environment.json` of a run: the machine and the package versions of each start."""

import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from maelstream.jobs.run_folder.folder import RunFolder, is_number
from maelstream.shards.durable import atomic_write

if TYPE_CHECKING:
    from maelstream.jobs.distributed.ranks import Ranks

MAX_TIME = 1e11
"""Seconds since 1970 that no time reaches; `time.localtime` accepts everything below."""
# fmt: off
_PACKAGES = ("maelstream", "torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "deepspeed", "timm",
             "numpy", "pyarrow", "webdataset", "pillow", "simplejpeg", "safetensors")
# fmt: on


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    step: int
    """Steps that the run had taken before this start."""
    began: float
    """Seconds since 1970."""
    command: str
    """The command that rank 0 runs, as typed in a shell: `maelstream pretrain ...`, whatever launched the ranks."""
    host: str
    system: str
    python: str
    processor: str
    cores: int
    """Cores that rank 0 may use."""
    memory_gib: float
    devices: tuple[str, ...]
    """Names of the GPUs of rank 0's machine; empty on a CPU."""
    cuda: str
    """CUDA version that torch was built for; empty if no GPU is used."""
    ranks: int
    ranks_a_host: int
    packages: dict[str, str]
    """Versions of the installed packages."""
    directory: str = ""
    """Working directory of rank 0, to which the recipe's paths are relative; empty up to version 0.1."""


def start_of(step: int, ranks: "Ranks") -> Start:
    """The environment of this process, which starts after `step` steps."""
    import torch

    gpus = range(torch.cuda.device_count())
    return Start(
        step=step,
        began=time.time(),
        command=typed_command(sys.argv),
        host=platform.node(),
        system=platform.platform(),
        python=platform.python_version(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        devices=tuple(torch.cuda.get_device_name(n) for n in gpus),
        cuda=(torch.version.cuda or "") if gpus else "",
        ranks=ranks.world_size,
        ranks_a_host=ranks.local_world_size,
        packages={name: found for name in _PACKAGES if (found := version(name))},
        directory=os.getcwd(),
    )


def typed_command(argv: list[str]) -> str:
    """The command as a user types it; launchers start ranks as `python -m maelstream.jobs.command pretrain ...` or
    `python -m maelstream.jobs.pretrain ...`, and deepspeed adds `--local_rank`.
    """
    program, args = Path(argv[0]), [arg for arg in argv[1:] if not arg.startswith(("--local_rank=", "--local-rank="))]
    if program.suffix != ".py" or program.resolve().parent != Path(__file__).resolve().parents[1]:
        return shlex.join([program.name, *args])
    command = [] if program.stem == "command" else [program.stem.replace("_", "-")]
    return shlex.join(["maelstream", *command, *args])


def record_start(folder: RunFolder, step: int, ranks: "Ranks") -> None:
    """Appends this start, after `step` steps, to `environment.json`; one rank calls it."""
    starts = [*read_starts(folder), start_of(step, ranks)]
    with atomic_write(folder.environment) as file:
        file.write(json.dumps([asdict(start) for start in starts], indent=1).encode() + b"\n")


def read_starts(folder: RunFolder) -> list[Start]:
    """All recorded starts, oldest first; empty if the run has no `environment.json`, or a damaged one."""
    if not folder.environment.is_file():
        return []
    try:
        starts = TypeAdapter(list[Start]).validate_json(folder.environment.read_bytes())
    except ValueError:
        return []
    return starts if all(0 <= start.began < MAX_TIME and is_number(start.memory_gib) for start in starts) else []


def version(package: str) -> str:
    """Version of an installed package; empty if it is not installed."""
    try:
        return installed(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """The kernel's name of the processor; the architecture if the kernel gives no name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
