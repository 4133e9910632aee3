"""Compares the rate of packing with the bare decode rate of libjpeg-turbo on the same cores and files.

The bare rate is the upper bound of a packer that decodes every image: processes with the files in memory only decode
them, and start-up is not counted. Packing is the whole command, from listing SRC to the finished dataset. Both are
measured in every round; the result is the median over rounds.

    python benchmarks/pack.py ../shared/imagenet-sample --workers 2
"""

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path

import simplejpeg
import tyro
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Options:
    """Compare packing with bare decoding."""

    src: tyro.conf.Positional[Path]
    """A folder that holds one folder of images per class."""
    workers: int = 2
    """Number of processes."""
    rounds: int = 3
    """Number of rounds."""
    repeat: int = 40
    """How many times each file is packed (as links); with few files, start-up would weigh more than in real use."""
    resize: int | None = None
    """Also pack with --resize."""
    json: Path | None = None
    """Also write the medians to this file."""


def jpegs(folder: Path) -> list[bytes]:
    """Contents of all JPEGs below `folder`."""
    return [data for path in sorted(folder.glob("*/*")) if (data := path.read_bytes())[:2] == b"\xff\xd8"]


def decode_all(files: Sequence[bytes], repeat: int) -> float:
    """Seconds to decode `files` `repeat` times."""
    began = time.perf_counter()
    for _ in range(repeat):
        for data in files:
            # Some ImageNet files are CMYK, which simplejpeg does not convert.
            simplejpeg.decode_jpeg(data, "CMYK" if simplejpeg.decode_jpeg_header(data)[2] == "CMYK" else "RGB")
    return time.perf_counter() - began


def bare_rate(pool: Pool, files: list[bytes], workers: int, repeat: int) -> float:
    """Images/s of decoding in all processes together."""
    shares = [files[number::workers] for number in range(workers)]
    seconds = pool.starmap(decode_all, [(share, repeat) for share in shares], chunksize=1)
    return sum(len(share) * repeat / s for share, s in zip(shares, seconds, strict=True))


def pack_rate(src: Path, out: Path, images: int, workers: int, *extra: str) -> float:
    """Images/s of `maelstream pack`."""
    command = [
        "from maelstream.jobs.command import main; main()",
        "pack",
        str(src),
        str(out),
        "--workers",
        str(workers),
        *extra,
    ]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", *command], check=True, stdout=subprocess.DEVNULL)
    return images / (time.perf_counter() - began)


def main() -> None:
    """Measures the rates and prints one table."""
    options = tyro.cli(Options)
    rates: dict[str, list[float]] = {"libjpeg-turbo alone": [], "maelstream pack": []}
    if options.resize is not None:
        rates[f"maelstream pack --resize {options.resize}"] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(options.workers) as pool,
    ):
        src, files = Path(folder) / "src", jpegs(options.src)
        images = 0
        for path in sorted(options.src.glob("*/*")):
            for number in range(options.repeat):
                (src / path.parent.name).mkdir(parents=True, exist_ok=True)
                os.symlink(path.resolve(), src / path.parent.name / f"{number}-{path.name}")
                images += 1
        for number in range(options.rounds):
            rates["libjpeg-turbo alone"].append(bare_rate(pool, files, options.workers, options.repeat // 4))
            for name, extra in zip(list(rates)[1:], ([], ["--resize", str(options.resize)]), strict=False):
                out = Path(folder) / f"out-{number}-{len(extra)}"
                rates[name].append(pack_rate(src, out, images, options.workers, "--shard-size", "64MiB", *extra))
                subprocess.run(["rm", "-r", str(out)], check=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    table = Table("", "images/s", "share of libjpeg-turbo", title=f"{images:,} images, {options.workers} processes")
    for name, median in medians.items():
        table.add_row(name, f"{median:,.0f}", f"{median / medians['libjpeg-turbo alone']:.0%}")
    Console().print(table)
    largest_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    print(f"peak memory of the largest process: {largest_mib:,.0f} MiB")
    if options.json is not None:
        options.json.write_text(json.dumps(medians | {"largest process, MiB": largest_mib}, indent=1))


if __name__ == "__main__":
    main()
