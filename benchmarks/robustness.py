"""Odd, damaged and mutated images through packing, verification and loading; flipped bytes in a training run.

    python -m benchmarks.robustness files FOLDER...        # collections of odd image files
    python -m benchmarks.robustness mutations              # 5,000 mutations of 20 seed images
    python -m benchmarks.robustness flips                  # 20 runs of pretrain on damaged shards
    python -m benchmarks.robustness rates SRC --before OLD # the cost of the checks

Every decoder and every command runs in a child process with a time limit, so a crash or a hang is counted, and this
process continues. docs/measured/robustness.md has the figures, and says where the collections come from.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from operator import truediv
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import ANY, patch

import google_crc32c
import numpy as np
import simplejpeg
import tyro
from nvidia.dali import Pipeline, fn, types
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.table import Table

from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.batch_plan import BatchSplit
from maelstream.pipeline.config import CropConfig, DecodeConfig, LoaderConfig
from maelstream.pipeline.loader import ImageLoader
from maelstream.pipeline.order import SampleOrder
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import QUARANTINE_NAME, Dataset
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.reader import ShardReader
from tests.conftest import TINY, photograph
from tests.helpers.forked import CONTEXT

BATCH = 64
FILE_S = 30.0  # limit for decoding one file
LEVELS = 2.0  # mean difference from PIL's picture that is allowed, of 255
EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "bmp", "dib", "gif", "tif", "tiff")
MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")


# --- children


class Died(NamedTuple):
    """A child that crashed or hung at one item."""

    how: str


def isolated(function: Callable[[Any], Any], items: Sequence[Any], limit_s: float) -> Iterator[Any]:
    """Yields `function(item)` of each item, computed in a child; `Died` where the child crashes or takes too long."""
    done = 0
    while done < len(items):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=_answer, args=(theirs, function, items[done:]))
        child.start()
        theirs.close()
        ours.recv()  # the child has started
        while done < len(items):
            answer: Any = Died("hang")
            if ours.poll(limit_s):
                try:
                    answer = ours.recv()
                except EOFError:
                    child.join()
                    answer = Died(f"exit code {child.exitcode}")
            else:
                child.kill()
            done += 1
            yield answer
            if isinstance(answer, Died):
                break
        child.join()


def _answer(connection: Connection, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print a line for each damaged file
    connection.send("started")
    for item in items:
        try:
            connection.send(function(item))
        except Exception as error:
            connection.send(Died(f"raised {error!r}"))
            return


class Ended(NamedTuple):
    """A command that ended, or that was killed because it took too long (code None)."""

    code: int | None
    seconds: float
    cpu_s: float
    output: str

    @property
    def crashed(self) -> bool:
        return self.code is not None and (self.code < 0 or self.code > 128)


def run(*args: str, limit_s: float, tree: Path | None = None) -> Ended:
    """Runs `maelstream ARGS`, of the code in `tree` if given."""
    command = [sys.executable, "-m", "maelstream.jobs.command", *args]
    environment = os.environ | ({"PYTHONPATH": str(tree)} if tree is not None else {})
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=tree, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        output.seek(0)
        return Ended(code, time.monotonic() - began, cpu_s, output.read())


# --- one folder of files through the whole path


class Judgement(NamedTuple):
    """How decoders see a file."""

    pil: str
    """Why PIL does not decode the source; empty if it does."""
    dali: str = ""
    """Why DALI does not decode the packed bytes; empty if it does."""
    levels: float = 0.0
    """Mean difference of DALI's full decode from PIL's picture."""
    window_levels: float = 0.0
    """The same for DALI's decode of the window in the middle."""


class Suspect(NamedTuple):
    """A file of the source, and its sample in the packed dataset (-1 if it was refused)."""

    path: str
    dataset: str
    sample: int


def pil_picture(data: bytes) -> np.ndarray:
    """The first frame as PIL decodes it: (H, W, 3), uint8; 16-bit gray is scaled to 8 bits, alpha is dropped."""
    # PIL refuses longer texts, although they are no part of the picture.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I"):
                gray = np.round(np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8)
                return np.repeat(gray[:, :, None], 3, axis=2)
            return np.asarray(image.convert("RGB"))


def dali_picture(data: bytes, window: tuple[int, int, int, int] | None) -> np.ndarray:
    """The picture, or its window (left, top, width, height), as DALI decodes it on the CPU: (H, W, 3), uint8.

    Raises:
        RuntimeError: DALI does not decode it.
    """
    pipeline = Pipeline(1, 1, None, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)
    options: dict[str, Any] = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
    with pipeline:
        encoded = fn.external_source(lambda: [np.frombuffer(data, np.uint8)])
        if window is None:
            pipeline.set_outputs(fn.decoders.image(encoded, **options))
        else:
            options |= {"start": window[:2], "shape": window[2:], "axis_names": "WH"}
            pipeline.set_outputs(fn.decoders.image_slice(encoded, **options))
    pipeline.build()
    return np.asarray(pipeline.run()[0][0]).copy()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference in levels of 255; 255 if the shapes differ."""
    if one.shape != other.shape:
        return 255.0
    return float(np.abs(one.astype(np.int16) - other).mean()) if one.size else 0.0


def middle(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of a window that covers about a quarter of an image."""
    left, top = width // 3, height // 5
    return left, top, max(1, width // 2), max(1, height // 2)


def judge(suspect: Suspect) -> Judgement:
    """Decodes a source with PIL, and its sample, if it has one, with DALI."""
    try:
        picture, refusal = pil_picture(Path(suspect.path).read_bytes()), ""
    except Exception as error:
        picture, refusal = np.empty(0), f"{type(error).__name__}: {error}"
    if suspect.sample < 0:
        return Judgement(refusal)
    (encoded,) = ShardReader(Dataset.open(suspect.dataset), False).read(np.array([suspect.sample]))
    try:
        decoded = dali_picture(encoded.tobytes(), None)
        left, top, width, height = middle(decoded.shape[1], decoded.shape[0])
        window = dali_picture(encoded.tobytes(), (left, top, width, height))
    except RuntimeError as error:
        return Judgement(refusal, " ".join(str(error).partition("encountered:")[2].split())[:300])
    if refusal:
        return Judgement(refusal)
    part = picture[top : top + height, left : left + width]
    return Judgement("", "", difference(decoded, picture), difference(window, part))


class Loaded(NamedTuple):
    """What the loader did with a dataset in one epoch."""

    samples: int
    bad: tuple[str, ...]
    failure: str


def load(folder: str) -> Loaded:
    """Loads every sample once, on the CPU, in batches of 64."""
    dataset, delivered = Dataset.open(folder), 0
    bad: list[BadSample] = []
    batches = -(-len(dataset) // BATCH)
    config = LoaderConfig(threads=2, decode=DecodeConfig(on="cpu"), max_bad_share=1.0)
    sampler, split = AugmentSampler(0, CropConfig(), (64, 64)), BatchSplit(BATCH, 1, 1)
    try:
        with ImageLoader(dataset, SampleOrder(len(dataset), 0), sampler, split, 0, config, on_bad=bad.append) as loader:
            for batch in islice(loader, batches):
                delivered += len(batch.samples)
    except Exception as error:
        return Loaded(delivered, tuple(map(str, bad)), f"{type(error).__name__}: {error}")
    return Loaded(delivered, tuple(map(str, bad)), "")


FAILURES = (
    "crash", "hang", "traceback", "command failed", "lost", "fault in verify", "bad in loader", "DALI raises",
    "differs from PIL", "window differs", "PIL does not decode it",
)  # fmt: skip
"""What must not happen; the last five concern accepted files."""


@dataclass
class Outcome:
    """What became of the files of one folder."""

    files: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Refused files by reason, without the numbers in it."""
    refused_pictures: list[str] = field(default_factory=list)
    """Refused files that PIL decodes, with the reasons."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of a kind of `FAILURES` and details."""

    def add(self, other: "Outcome") -> None:
        self.files, self.accepted = self.files + other.files, self.accepted + other.accepted
        self.refused.update(other.refused)
        self.refused_pictures += other.refused_pictures
        self.failures += other.failures

    def note(self, what: str, ended: Ended) -> bool:
        """Records a failure of a command; returns whether it ended with 0."""
        tail = " | ".join(ended.output.strip().splitlines()[-3:])[-400:]
        kind = "hang" if ended.code is None else "crash" if ended.crashed else "command failed" if ended.code else ""
        if kind:
            self.failures.append((kind, f"{what}, exit code {ended.code}: {tail}"))
        if "Traceback" in ended.output:
            self.failures.append(("traceback", f"{what}: {tail}"))
        return ended.code == 0


def add_controls(folder: Path) -> set[str]:
    """Writes 64 sound images, so that a dataset has a whole batch whatever is refused; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(BATCH):
        name = f"control-{number:02d}.{('png', 'jpg')[number % 2]}"
        photograph(40 + number, 100 - number, number).save(folder / name, quality=90)
    return {path.name for path in folder.glob("control-*")}


def through(source: Path, work: Path, *options: str) -> Outcome:
    """Packs, verifies and loads the files of `source`/all, and compares every accepted one with PIL's picture."""
    controls = add_controls(source / "all")
    names = {path.name for path in (source / "all").iterdir()} - controls
    outcome, target = Outcome(len(names)), work / "packed"
    shutil.rmtree(target, ignore_errors=True)
    limit_s = 600 + 4.0 * len(names)
    packing = ("pack", str(source), str(target), "--shard-size", "4MiB", "--workers", "2", *options)
    if not outcome.note("pack", run(*packing, limit_s=limit_s)):
        return outcome
    verified = run("verify", str(target), "--deep", limit_s=limit_s)
    if verified.code == 1 and "faults" in verified.output:
        outcome.failures += [("fault in verify", line) for line in verified.output.splitlines()[:-1]]
    else:
        outcome.note("verify --deep", verified)
    dataset = Dataset.open(target)
    quarantine = [json.loads(line) for line in (target / QUARANTINE_NAME).read_text().splitlines()]
    reasons = {line["source"].rpartition("/")[2]: line["reason"] for line in quarantine}
    samples = {name.rpartition("/")[2]: n for n, name in enumerate(dataset.sources(np.arange(len(dataset))))}
    outcome.accepted = len(names & samples.keys())
    outcome.refused.update("".join(" " if c.isdigit() else c for c in reasons[name]) for name in names & reasons.keys())
    lost = (names | controls) - samples.keys() - reasons.keys() | (controls - samples.keys())
    outcome.failures += [("lost", name) for name in sorted(lost)]
    (loaded,) = isolated(load, [str(target)], limit_s)
    if isinstance(loaded, Died):
        outcome.failures.append(("hang" if loaded.how == "hang" else "crash", f"loader, {loaded.how}"))
    else:
        outcome.failures += [("bad in loader", text) for text in (*loaded.bad, *filter(None, [loaded.failure]))]
    suspects = [Suspect(str(source / "all" / name), str(target), samples.get(name, -1)) for name in sorted(names)]
    for suspect, judgement in zip(suspects, isolated(judge, suspects, FILE_S), strict=True):
        name = Path(suspect.path).name
        if isinstance(judgement, Died):
            if suspect.sample >= 0:  # otherwise PIL died at a file that was refused
                outcome.failures.append(("hang" if judgement.how == "hang" else "crash", f"{name}, {judgement.how}"))
            continue
        if suspect.sample < 0:
            if not judgement.pil:
                outcome.refused_pictures.append(f"{name}: {reasons.get(name, 'not named')}")
        elif judgement.dali:
            outcome.failures.append(("DALI raises", f"{name}: {judgement.dali}"))
        elif judgement.pil:
            outcome.failures.append(("PIL does not decode it", f"{name}: {judgement.pil}"))
        elif judgement.levels > LEVELS:
            outcome.failures.append(("differs from PIL", f"{name}: {judgement.levels:.1f} levels"))
        elif judgement.window_levels > LEVELS:
            outcome.failures.append(("window differs", f"{name}: {judgement.window_levels:.1f} levels"))
    return outcome


# --- files


def is_image_file(path: Path) -> bool:
    """Whether a file is one that a user might give as an image: by its extension, or by its first bytes."""
    if not path.is_file() or path.stat().st_size > 2**27:
        return False
    with path.open("rb") as file:
        return path.suffix.lower()[1:] in EXTENSIONS or file.read(4).startswith(MAGIC)


def collect(folder: Path, into: Path) -> None:
    """Copies the image files below `folder`, each content once, under unique names that end in an image extension."""
    into.mkdir(parents=True)
    seen = set()
    for number, path in enumerate(sorted(filter(is_image_file, folder.rglob("*")))):
        data = path.read_bytes()
        if (digest := hashlib.sha256(data).digest()) not in seen:
            seen.add(digest)
            extension = "" if path.suffix.lower()[1:] in ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif") else ".jpg"
            (into / f"{number:05d}-{path.name}{extension}").write_bytes(data)


@dataclass(frozen=True)
class Files:
    """Pack, verify and load collections of odd image files."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of image files, each with all its sub-folders."""
    reencode: bool = True
    """Also pack with --reencode, which stores what PIL decodes and DALI does not as PNG."""
    details: Path | None = None
    """Also write one line per failure, and per refused file that PIL decodes, to this file."""

    def measure(self, work: Path) -> dict[str, Outcome]:
        """One row per collection and way of packing."""
        rows: dict[str, Outcome] = {}
        for folder in self.folders:
            collect(folder, work / folder.name / "all")
            for options in [(), ("--reencode",)] if self.reencode else [()]:
                name = " ".join((folder.name, *options))
                rows[name] = through(work / folder.name, work, *options)
                print(f"{name}: {rows[name].files:,} files, {len(rows[name].failures)} failures", flush=True)
            shutil.rmtree(work / folder.name)
        return rows


# --- mutations


def png(width: int, height: int, bits: int, colour_type: int, interlaced: bool, rows: list[bytes]) -> bytes:
    """A PNG of unfiltered rows (PNG specification, 5.3 and 7)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def interlaced_png(picture: np.ndarray) -> bytes:
    """An interlaced PNG (Adam7; PNG specification, 8.2) of an RGB picture."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [row.tobytes() for top, left, down, right in passes for row in picture[top::down, left::right]]
    return png(picture.shape[1], picture.shape[0], 8, 2, True, rows)


def lossless_jpeg(width: int, height: int) -> bytes:
    """A lossless JPEG (SOF3; ITU T.81, annex H) of one gray level: each difference is 0 and takes one bit."""
    frame = struct.pack(">2sHBHHB3B", b"\xff\xc3", 11, 8, height, width, 1, 1, 0x11, 0)
    table = struct.pack(">2sHB16BB", b"\xff\xc4", 20, 0, 1, *[0] * 15, 0)
    scan = struct.pack(">2sHB2B3B", b"\xff\xda", 8, 1, 1, 0, 1, 0, 0)
    return b"\xff\xd8" + frame + table + scan + bytes(-(-width * height // 8)) + b"\xff\xd9"


def seed_images() -> dict[str, bytes]:
    """20 sound files of the forms that people have, by file name."""
    picture = photograph(96, 72, 1)
    with_alpha = picture.convert("RGBA")
    with_alpha.putalpha(photograph(96, 72, 2).convert("L"))
    gray16 = (np.asarray(picture.convert("L")).astype(np.uint16) * 257).astype("<u2")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"

    def saved(image: Image.Image, form: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    return {
        "baseline.jpg": saved(picture, "JPEG", quality=85, subsampling="4:2:0"),
        "progressive.jpg": saved(picture, "JPEG", progressive=True, subsampling="4:2:2"),
        "gray.jpg": saved(picture.convert("L"), "JPEG"),
        "cmyk.jpg": saved(picture.convert("CMYK"), "JPEG"),
        "optimised.jpg": saved(picture, "JPEG", optimize=True, subsampling="4:4:4"),
        "411.jpg": simplejpeg.encode_jpeg(np.asarray(picture), colorsubsampling="411"),
        "restart.jpg": saved(picture, "JPEG", restart_marker_blocks=4),
        "exif.jpg": saved(picture, "JPEG", exif=exif, comment=b"a comment"),
        "lossless.jpg": lossless_jpeg(96, 72),
        "1-bit.png": saved(picture.convert("1"), "PNG"),
        "gray.png": saved(picture.convert("L"), "PNG"),
        "gray16.png": saved(Image.fromarray(gray16), "PNG"),
        "rgb.png": saved(picture, "PNG"),
        "rgba.png": saved(with_alpha, "PNG"),
        "palette.png": saved(picture.convert("P"), "PNG", transparency=3),
        "interlaced.png": interlaced_png(np.asarray(picture)),
        "lossy.webp": saved(picture, "WEBP", quality=80),
        "lossless-alpha.webp": saved(with_alpha, "WEBP", lossless=True),
        "rgb.bmp": saved(picture, "BMP"),
        "palette.bmp": saved(picture.convert("P"), "BMP"),
    }


def segments(data: bytes) -> list[tuple[int, int]]:
    """Start and end of each segment of a JPEG's header, chunk of a PNG or WebP, or part of a BMP."""
    found, offset = [], 2 if data[:2] == b"\xff\xd8" else 8 if data[:4] == b"\x89PNG" else 12
    while offset + 12 <= len(data):
        if data[:2] == b"\xff\xd8":
            size = 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        elif data[:4] == b"\x89PNG":
            size = 12 + int.from_bytes(data[offset : offset + 4], "big")
        elif data[:4] == b"RIFF":
            size = 8 + int.from_bytes(data[offset + 4 : offset + 8], "little")
            size += size % 2  # a chunk of odd size is padded
        else:
            return [(0, 14), (14, 54), (54, len(data))]
        end = min(offset + size, len(data))
        found.append((offset, end))
        if data[:2] == b"\xff\xd8" and data[offset + 1] == 0xDA:
            found[-1] = offset, len(data)
            break
        offset = end
    return found


def with_right_crcs(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, so that a decoder reads on to what was changed."""
    fixed = bytearray(data)
    for start, end in segments(data):
        fixed[end - 4 : end] = struct.pack(">I", zlib.crc32(data[start + 4 : end - 4]))
    return bytes(fixed)


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """`seed` with one to three random changes of the kinds in `MUTATIONS`."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if data:
            rng.choice(MUTATIONS)(data, rng)
    changed = bytes(data)
    return with_right_crcs(changed) if changed[:4] == b"\x89PNG" and rng.random() < 0.5 else changed


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def change_bytes(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 2, 16))):
        data[rng.randrange(len(data))] = rng.randrange(256)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _span(data: bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 4, 64, 1024)))


def zero(data: bytearray, rng: random.Random) -> None:
    start, end = _span(data, rng)
    data[start:end] = bytes(end - start)


def remove(data: bytearray, rng: random.Random) -> None:
    start, end = _span(data, rng)
    del data[start:end]


def repeat(data: bytearray, rng: random.Random) -> None:
    start, end = _span(data, rng)
    data[start:start] = data[start:end]


def set_header_field(data: bytearray, rng: random.Random) -> None:
    """Sets one, two or four bytes in the first part of a segment to an extreme value."""
    start, end = rng.choice(segments(bytes(data)) or [(0, len(data))])
    place, size = rng.randrange(start, min(end, start + 40)), rng.choice((1, 2, 4))
    value = rng.choice((0, 1, 2**7 - 1, 2**8 - 1, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1)) % 2 ** (8 * size)
    data[place : place + size] = value.to_bytes(size, rng.choice(("big", "little")))


def change_marker(data: bytearray, rng: random.Random) -> None:
    """Changes the type of a segment: a JPEG marker, or one letter of a chunk's name."""
    start, _ = rng.choice(segments(bytes(data)) or [(0, 1)])
    is_jpeg, name = data[:2] == b"\xff\xd8", 4 if data[:4] == b"\x89PNG" else 0
    place = start + (1 if is_jpeg else name + rng.randrange(4))
    if place < len(data):
        data[place] = rng.randrange(0xC0, 0x100) if is_jpeg else data[place] ^ 1 << rng.randrange(6)


def swap_segments(data: bytearray, rng: random.Random) -> None:
    found = segments(bytes(data))
    if len(found) > 1:
        (a, b), (c, d) = sorted(rng.sample(found, 2))
        data[:] = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def repeat_segment(data: bytearray, rng: random.Random) -> None:
    start, end = rng.choice(segments(bytes(data)) or [(0, len(data))])
    data[end:end] = data[start:end]


MUTATIONS = (
    flip_bits, change_bytes, cut, zero, remove, repeat, set_header_field, set_header_field, change_marker,
    swap_segments, repeat_segment,
)  # fmt: skip


@dataclass(frozen=True)
class Mutations:
    """Pack, verify and load random mutations of 20 seed images."""

    count: int = 5000
    """Number of mutated files."""
    seed: int = 0
    per_dataset: int = 1000
    """Files in one packed dataset."""
    reencode: bool = False
    """Pack with --reencode."""
    keep: Path | None = None
    """Keep all mutated files in this folder."""
    details: Path | None = None
    """Also write one line per failure, and per refused file that PIL decodes, to this file."""

    def measure(self, work: Path) -> dict[str, Outcome]:
        """One row for all files."""
        total, seeds = Outcome(), sorted(seed_images().items())
        for start in range(0, self.count, self.per_dataset):
            folder = work / f"from-{start}" / "all"
            folder.mkdir(parents=True)
            for number in range(start, min(start + self.per_dataset, self.count)):
                name, data = seeds[number % len(seeds)]
                changed = mutated(data, random.Random(f"{self.seed}/{number}"))
                (folder / f"{number:05d}-{name}").write_bytes(changed)
            if self.keep is not None:
                shutil.copytree(folder, self.keep, dirs_exist_ok=True)
            total.add(through(folder.parent, work, *(["--reencode"] if self.reencode else [])))
            print(f"{min(start + self.per_dataset, self.count):,} files, {len(total.failures)} failures", flush=True)
        return {"mutations" + " --reencode" * self.reencode: total}


def print_outcomes(rows: dict[str, Outcome], details: Path | None) -> int:
    """Prints one row per collection, the kinds of failures, and why files were refused; returns 1 if any failed."""
    if len(rows) > 1:
        total = Outcome()
        for outcome in rows.values():
            total.add(outcome)
        rows = rows | {"all": total}
    last = list(rows.values())[-1]
    console = Console(width=150)
    table = Table("", "files", "accepted", "refused", "of them PIL decodes", "failures")
    for name, outcome in rows.items():
        refused = sum(outcome.refused.values())
        row = outcome.files, outcome.accepted, refused, len(outcome.refused_pictures), len(outcome.failures)
        table.add_row(name, *(f"{number:,}" for number in row))
    console.print(table)
    kinds = Table("failure", "number", "first")
    for kind in FAILURES:
        found = [text for other, text in last.failures if other == kind]
        kinds.add_row(kind, str(len(found)), found[0] if found else "")
    console.print(kinds)
    reasons = Table("refused because", "files")
    for reason, number in last.refused.most_common(25):
        reasons.add_row(reason, f"{number:,}")
    console.print(reasons)
    if details is not None:
        lines = [(name, *failure) for name, outcome in rows.items() for failure in outcome.failures]
        lines += [(name, "refused", text) for name, outcome in rows.items() for text in outcome.refused_pictures]
        details.write_text("".join("\t".join(line) + "\n" for line in lines))
    return 1 if last.failures else 0


# --- flips


class Case(NamedTuple):
    """A share of the samples that are damaged, and the share that the run allows (None: the default)."""

    share: float
    allowed: float | None


CASES = (Case(0.01, None), Case(0.01, 0.05), Case(0.1, 0.2), Case(1.0, None), Case(1.0, 1.0))


def write_mixed_images(folder: Path, count: int) -> None:
    """Photographs of many sizes as JPEG, PNG and BMP in turn."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for number in range(count):
        name = f"{number:04d}.{('jpg', 'png', 'bmp')[number % 3]}"
        photograph(rng.randrange(40, 160), rng.randrange(40, 160), number).save(folder / name, quality=90)


def flip_bytes(dataset: Dataset, samples: Sequence[int], rng: random.Random) -> None:
    """Changes one byte of the image of each of `samples`, in the shards on disk."""
    for sample in samples:
        path, _ = dataset.path_and_key(sample)
        with Path(path).open("r+b") as file:
            place = int(dataset.offset[sample]) + rng.randrange(int(dataset.size[sample]))
            file.seek(place)
            (old,) = file.read(1)
            file.seek(place)
            file.write(bytes([old ^ rng.randrange(1, 256)]))


class FlipRun(NamedTuple):
    """One run of pretrain on a damaged dataset."""

    case: Case
    ended: Ended
    damaged: int
    met: int
    """Damaged samples in the batches that the run trained on."""
    named: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Flips:
    """Flip one byte in 1, 10 and 100 % of the samples on disk, and train on them."""

    runs: int = 20
    images: int = 600
    seed: int = 0
    limit_s: float = 180.0
    """Seconds after which a run counts as hanging."""

    def measure(self, work: Path) -> list[FlipRun]:
        """One row per run."""
        write_mixed_images(work / "images" / "all", self.images)
        packing = run("pack", str(work / "images"), str(work / "whole"), "--shard-size", "1MiB", limit_s=300)
        if packing.code:
            raise MaelstreamError(f"packing failed: {packing.output}")
        runs = []
        for number in range(self.runs):
            runs.append(self.train(work, CASES[number % len(CASES)], number))
            print_flip(number, runs[-1])
        return runs

    def train(self, work: Path, case: Case, number: int) -> FlipRun:
        """Damages a copy of the dataset and trains on it."""
        rng, folder, seed = random.Random(f"{self.seed}/{number}"), RunFolder(work / "run"), self.seed + number
        for path in (folder.path, work / "damaged"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(work / "whole", work / "damaged")
        dataset = Dataset.open(work / "damaged")
        damaged = sorted(rng.sample(range(len(dataset)), max(1, round(case.share * len(dataset)))))
        flip_bytes(dataset, damaged, rng)
        recipe = work / "flips.yaml"
        recipe.write_text(TINY + f"data: {{dataset: {work / 'damaged'}}}\n")
        arguments = ["--run", str(folder.path), "--seed", str(seed), "--loader.decode.on", "cpu", "--optim.epochs", "2"]
        arguments += ["--optim.batch-size", str(BATCH), "--engine.micro-batch-size", str(BATCH)]
        arguments += [] if case.allowed is None else ["--loader.max-bad-share", str(case.allowed)]
        ended = run("pretrain", str(recipe), *arguments, limit_s=self.limit_s)
        lines = folder.quarantined.read_text().splitlines() if folder.quarantined.exists() else []
        named = {json.loads(line)["sample"] for line in lines}
        steps = max((line["step"] for line in folder.read_metrics()), default=0)
        _, _, samples = SampleOrder(len(dataset), seed).lookup(np.arange(steps * BATCH))
        met = set(damaged) & set(samples.tolist())
        failures = []
        if ended.code not in (0, 2):
            failures.append("hang" if ended.code is None else f"exit code {ended.code}")
        if "Traceback" in ended.output:
            failures.append("traceback")
        if unnamed := met - named:
            failures.append(f"{len(unnamed)} damaged samples trained on and not named")
        if wrong := named - set(damaged):
            failures.append(f"{len(wrong)} sound samples named")
        if ended.code == 2 and not named:
            failures.append("ended without naming a sample")
        return FlipRun(case, ended, len(damaged), len(met), len(named), tuple(failures))


def print_flip(number: int, result: FlipRun) -> None:
    """One line per run; with the output's last line if the run did not finish."""
    last = (result.ended.output.strip().splitlines() or [""])[-1]
    allowed = "default" if result.case.allowed is None else f"{result.case.allowed:g}"
    print(
        f"run {number}: {result.case.share:.0%} damaged ({result.damaged}), allowed {allowed}: exit code "
        f"{result.ended.code} after {result.ended.seconds:.0f} s, {result.met} met, {result.named} named; "
        f"{'; '.join(result.failures) or 'as it should be'}" + (f"\n    {last[:300]}" if result.ended.code else ""),
        flush=True,
    )


# --- rates


class Timing(NamedTuple):
    """Images per second, and per second of CPU time."""

    images_per_s: float
    images_per_cpu_s: float


@dataclass(frozen=True)
class Rates:
    """Measure the loader's rate with and without CRC checks, and packing's with and without the checks by DALI."""

    src: tyro.conf.Positional[Path]
    """A folder that holds one folder of images per class."""
    before: Path | None = None
    """A clone of an older commit; its packing is the one without the new checks."""
    rounds: int = 7
    """Alternations."""
    batches: int = 40
    """Batches of the loader per round and candidate."""
    repeat: int = 10
    """How many times each file is packed (as links), so that start-up weighs little."""
    threads: int = 2

    def measure(self, work: Path) -> dict[str, dict[str, list[Timing]]]:
        """The timings of each candidate, by round."""
        images = 0
        for path in sorted(self.src.glob("*/*")):
            for number in range(self.repeat):
                (work / "src" / path.parent.name).mkdir(parents=True, exist_ok=True)
                os.symlink(path.resolve(), work / "src" / path.parent.name / f"{number}-{path.name}")
                images += 1
        trees: dict[str, Path | None] = {"pack, with the checks": None}
        if self.before is not None:
            trees["pack, older commit"] = self.before.resolve()
        packs: dict[str, list[Timing]] = {name: [] for name in trees}
        loads: dict[str, list[Timing]] = {"loader, with CRC": [], "loader, without CRC": []}
        for number in range(self.rounds):
            for name, tree in sorted(trees.items(), reverse=bool(number % 2)):
                packs[name].append(self.pack(work, images, tree))
            print(f"round {number + 1}", *(f"{name}: {one[-1].images_per_s:,.0f}/s" for name, one in packs.items()))
        dataset = Dataset.open(work / "packed")
        for number in range(self.rounds):
            for name in sorted(loads, reverse=bool(number % 2)):
                loads[name].append(self.load(dataset, name == "loader, with CRC"))
        return {"loader": loads, "pack": packs}

    def pack(self, work: Path, images: int, tree: Path | None) -> Timing:
        shutil.rmtree(work / "packed", ignore_errors=True)
        arguments = ("pack", str(work / "src"), str(work / "packed"), "--workers", str(self.threads))
        ended = run(*arguments, "--shard-size", "64MiB", limit_s=1800, tree=tree)
        if ended.code:
            raise MaelstreamError(f"packing failed: {ended.output}")
        return Timing(images / ended.seconds, images / ended.cpu_s)

    def load(self, dataset: Dataset, check: bool) -> Timing:
        order, sampler = SampleOrder(len(dataset), 0), AugmentSampler(0, CropConfig(), (224, 224))
        # ANY equals every checksum, and costs nothing.
        unchecked = patch.object(google_crc32c, "value", lambda _: ANY)
        with (
            contextlib.nullcontext() if check else unchecked,
            ImageLoader(dataset, order, sampler, BatchSplit(BATCH, 1, 1), 0, LoaderConfig(self.threads)) as loader,
        ):
            batches = iter(loader)
            for _ in islice(batches, 8):  # start-up and prefetching distort the first ones
                pass
            began, cpu = time.perf_counter(), time.process_time()
            for _ in islice(batches, self.batches):
                pass
            images = self.batches * BATCH
            return Timing(images / (time.perf_counter() - began), images / (time.process_time() - cpu))


def print_rates(timings: dict[str, dict[str, list[Timing]]]) -> None:
    """Medians, and the ratio of the first candidate to the second: of the medians, and the median of each round's."""
    for candidates in timings.values():
        table = Table("", "images/s", "images per CPU second")
        for name, rounds in candidates.items():
            table.add_row(name, *(f"{statistics.median(values):,.0f}" for values in zip(*rounds, strict=True)))
        if len(candidates) == 2:
            ours, theirs = candidates.values()
            for title, ratio in (
                ("ratio of the medians", lambda a, b: statistics.median(a) / statistics.median(b)),
                ("median of the rounds' ratios", lambda a, b: statistics.median(map(truediv, a, b))),
            ):
                columns = zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
                table.add_row(title, *(f"{ratio(a, b):.3f}" for a, b in columns))
        Console().print(table)


Part = (
    Annotated[Files, tyro.conf.subcommand("files")]
    | Annotated[Mutations, tyro.conf.subcommand("mutations")]
    | Annotated[Flips, tyro.conf.subcommand("flips")]
    | Annotated[Rates, tyro.conf.subcommand("rates")]
)


def main() -> int:
    """Measures one part and prints its table; 1 if something failed."""
    part = tyro.cli(Part, prog="python -m benchmarks.robustness", description=__doc__)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    CONTEXT.set_forkserver_preload(["tests.conftest", "maelstream.pipeline.loader"])  # the tests' list imports more
    with tempfile.TemporaryDirectory() as name:
        if isinstance(part, Files | Mutations):
            return print_outcomes(part.measure(Path(name)), part.details)
        if isinstance(part, Flips):
            return 1 if any(result.failures for result in part.measure(Path(name))) else 0
        print_rates(part.measure(Path(name)))
        return 0


if __name__ == "__main__":
    sys.exit(main())
