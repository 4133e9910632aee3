"""Of very long images, only the part that a crop needs is decoded and resized; the crop is that of the whole resize."""

import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float64
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from maelstream.pipeline.augment_params import needed_windows, resized_crop
from maelstream.pipeline.config import MARGIN
from maelstream.pipeline.dali_graph import decoded_windows, resized_windows
from maelstream.pipeline.decode import CpuDecoder, EncodedBatch, dali_inputs

SIZE = (224, 224)
LONG = [(700, 10), (10, 700), (3, 1000), (1, 300), (300, 1), (97, 6500), (6500, 97)]  # width, height
ORDINARY = [(300, 200), (200, 300), (64, 64), (31, 400), (1, 1)]
# Left and top as shares of what is free: the evaluation's centre, both ends, and positions between pixels.
starts = pytest.mark.parametrize("at", [None, (0.0, 0.0), (0.9999, 0.9999), (0.1234, 0.7531)])


def picture(width: int, height: int, noise: bool) -> np.ndarray:
    random = np.random.default_rng(width + height)
    if noise:
        return random.integers(0, 256, (height, width, 3)).astype(np.uint8)
    ramps = np.cumsum(np.cumsum(random.normal(0, 2, (height, width, 3)), axis=0), axis=1)
    return (127 + 120 * np.sin(ramps / 30)).astype(np.uint8)


def encoded(pixels: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


PICTURES = {kind: [picture(*size, k % 2 == 0) for k, size in enumerate(kind)] for kind in map(tuple, (LONG, ORDINARY))}


def whole_resizes(sizes: list[tuple[int, int]], at: tuple[float, float] | None) -> Float64[np.ndarray, "b 4"]:
    numbers = None if at is None else np.tile(np.array(at), (len(sizes), 1))
    widths, heights = np.array(sizes).T
    return resized_crop(numbers, widths, heights, SIZE, MARGIN)


def batch_of(sizes: list[tuple[int, int]], at: tuple[float, float] | None) -> EncodedBatch:
    widths, heights = np.array(sizes).T
    windows, resizes = needed_windows(widths, heights, whole_resizes(sizes, at), SIZE)
    return EncodedBatch(
        [encoded(pixels) for pixels in PICTURES[tuple(sizes)]], windows, resizes, np.zeros(len(sizes), bool), None
    )


def by_pil(sizes: list[tuple[int, int]], at: tuple[float, float] | None) -> np.ndarray:
    """The whole image resized, then cropped: what the reference does."""
    crops = []
    rows = zip(PICTURES[tuple(sizes)], whole_resizes(sizes, at).astype(int).tolist(), strict=True)
    for pixels, (height, width, top, left) in rows:
        resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
        crops.append(resized[top : top + SIZE[0], left : left + SIZE[1]].transpose(2, 0, 1))
    return np.stack(crops).astype(int)


def dali(batch: EncodedBatch, whole: np.ndarray | None = None) -> np.ndarray:
    """Images of the GPU's graph with its nodes on the CPU; with `whole`, those of a resize followed by a crop."""
    pipeline = Pipeline(len(batch.encoded), 1, device_id=None)
    with pipeline:
        if whole is None:
            images = resized_windows(lambda _: dali_inputs(batch), SIZE, "cpu", "window")
        else:
            data, start, window, size, crop = fn.external_source(
                lambda _: (*dali_inputs(batch)[:3], whole[:, :2].astype(np.float32), whole[:, 2:].astype(np.int32)),
                num_outputs=5,
            )
            images = decoded_windows(data, start, window, "cpu", "window")
            images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            images = fn.slice(images, start=crop, shape=list(SIZE), axes=[0, 1])
        pipeline.set_outputs(images)
    pipeline.build()
    (images,) = pipeline.run()
    return np.asarray(images.as_tensor()).transpose(0, 3, 1, 2).astype(int)


def cpu(batch: EncodedBatch) -> np.ndarray:
    return CpuDecoder(lambda _: batch, len(batch.encoded), SIZE, 1, torch.device("cpu")).run().numpy().astype(int)


@starts
@pytest.mark.parametrize("sizes", [LONG, ORDINARY], ids=["long", "ordinary"])
def test_a_crop_is_within_two_levels_of_pils_resize_of_the_whole_image(
    sizes: list[tuple[int, int]], at: tuple[float, float] | None
) -> None:
    batch = batch_of(sizes, at)
    areas = [
        window[2] * window[3] / (width * height) for window, (width, height) in zip(batch.windows, sizes, strict=True)
    ]
    assert max(areas) < 0.9 if sizes is LONG else min(areas) == 1
    difference = np.abs(cpu(batch) - by_pil(sizes, at))
    assert difference.max() <= 2 and difference.mean() < 0.02


@starts
@pytest.mark.parametrize("sizes", [LONG, ORDINARY], ids=["long", "ordinary"])
def test_the_gpu_graph_computes_only_the_crop_and_equals_a_resize_followed_by_a_crop(
    sizes: list[tuple[int, int]], at: tuple[float, float] | None
) -> None:
    batch, whole = batch_of(sizes, at), whole_resizes(sizes, at)
    widths, heights = np.array(sizes, np.int32).T
    windows = np.stack([0 * widths, 0 * heights, widths, heights], axis=1)
    expected = dali(EncodedBatch(batch.encoded, windows, whole, batch.flips, None), whole)
    assert np.abs(dali(batch) - expected).max() <= 1


PEAK = """
import sys
from pathlib import Path
import numpy as np, torch
from maelstream.jobs.recipe import Recipe
from maelstream.jobs.reporting.reconstruction import folder_images
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.config import CropConfig
from maelstream.pipeline.decode import CpuDecoder, EncodedBatch

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024  # MiB

def decode(path, crop):
    width, height = map(int, path.stem.split("x"))
    one = np.zeros(1, int)
    params = AugmentSampler(0, crop, (224, 224)).at(one, one, np.array([width]), np.array([height]))
    batch = EncodedBatch.of([np.fromfile(path, np.uint8)], params)
    return CpuDecoder(lambda _: batch, 1, (224, 224), 1, torch.device("cpu"), ahead=1).run()

folder, kinds = Path(sys.argv[1]), {"fixed_size": CropConfig("fixed_size"), "none": CropConfig("none")}
kinds |= {"random_size": CropConfig(), "one_draw": CropConfig(sampler="one_draw")}
paths = sorted(folder.glob("*.png"), key=lambda path: path.stat().st_size)
decode(paths[0], CropConfig("none"))  # a small one, for what the libraries keep
before = status("VmRSS")
for kind in sys.argv[2:]:
    if kind == "reconstruct":
        images = [folder_images(folder, len(paths), Recipe()).images]
    else:
        images = [decode(path, kinds[kind]) for path in paths]
    assert all(set(image.flatten().tolist()) == {120} for image in images)
print(status("VmHWM") - before)
"""


def one_colour_png(width: int, height: int) -> bytes:
    """A gray PNG; PIL would need the whole picture in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    rows, compressor = bytes([0, *[120] * width]), zlib.compressobj(1)
    at_once = max(1, 2**20 // len(rows))
    parts = [compressor.compress(rows * at_once) for _ in range(height // at_once)]
    parts += [compressor.compress(rows * (height % at_once)), compressor.flush()]
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(parts)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("sizes", "kinds"),
    [
        ([(1, 60_000), (60_000, 1), (1_000_000, 2)], ["random_size", "one_draw", "fixed_size", "none", "reconstruct"]),
        ([(8192, 8192)], ["none"]),
        ([(8192, 8192)], ["reconstruct"]),
    ],
)
def test_the_peak_memory_stays_below_500_mib(tmp_path: Path, sizes: list[tuple[int, int]], kinds: list[str]) -> None:
    """Training, evaluation and reconstruction; 2**26 pixels of RGB alone are 192 MiB, and DALI holds them twice."""
    for width, height in [(30, 20), *sizes]:
        (tmp_path / f"{width}x{height}.png").write_bytes(one_colour_png(width, height))
    command = [sys.executable, "-c", PEAK, str(tmp_path), *kinds]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(output.splitlines()[-1]) < 500
