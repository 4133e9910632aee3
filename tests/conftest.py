"""Fixtures for all tests: small packed datasets of generated images."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from maelstream.jobs.pack import main as pack
from maelstream.shards.dataset import Dataset

# Two ranks of a test share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Examples have no deadline: machines differ in speed.
settings.register_profile("maelstream", deadline=None)
settings.load_profile("maelstream")

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
"""Parameters of tests that must pass on both devices; `make gpu-check` runs those marked `gpu`."""

SHARED = Path(__file__).parents[2] / "shared"


def encoded(image: Image.Image, form: str, **options: object) -> np.ndarray:
    """File bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def photograph(width: int = 300, height: int = 200, seed: int = 0) -> Image.Image:
    """A smooth colour image that depends only on `seed`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_images(folder: Path, classes: int, per_class: int, seed: int = 0) -> Path:
    """Writes class folders of JPEGs of many sizes. Their smooth colours make crops and resizes differ."""
    random = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label:02d}").mkdir(parents=True)
        for number in range(per_class):
            width, height = random.integers(40, 160, 2)
            coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
            image.save(folder / f"class{label:02d}" / f"{number:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """60 samples of 3 classes in several shards."""
    folder = tmp_path_factory.mktemp("packed")
    write_images(folder / "images", classes=3, per_class=20)
    assert pack([str(folder / "images"), str(folder / "shards"), "--shard-size", "40KiB", "--workers", "1"]) == 0
    return Dataset.open(folder / "shards")


TINY = """
model: {image_size: [32, 32], patch_size: 8, dim: 48, depth: 2, heads: 3, decoder_dim: 32, decoder_depth: 1,
        decoder_heads: 4}
optim: {batch_size: 12, base_lr: 0.05, warmup_epochs: 0.5, epochs: 2.4}
engine: {micro_batch_size: 6}
log: {every_steps: 1}
checkpoint: {every_steps: 4, keep: 2}
"""  # 12 steps, 5 per epoch; the peak lr is the paper's 2.4e-3


@pytest.fixture(scope="session")
def tiny(packed: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe that trains in a second."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY + f"data: {{dataset: {packed.folder}}}\n")
    return str(path)


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """A folder of real ImageNet files; tests skip without it."""
    if not (folder := SHARED / "imagenet-sample").is_dir():
        pytest.skip("no shared/imagenet-sample next to the repository")
    return folder
