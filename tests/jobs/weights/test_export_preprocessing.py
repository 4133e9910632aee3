"""What is exported prepares images as our evaluation does: transformers' image processor and timm's transform."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor, ViTImageProcessor

from maelstream.jobs.weights.export_formats import hf_config, hf_preprocessing, timm_config
from maelstream.model.config import MAEConfig
from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.decode import CpuDecoder, EncodedBatch
from maelstream.pipeline.eval_pass import Reading
from tests.conftest import photograph

PICTURES = [photograph(500, 375), photograph(333, 640), photograph(100, 90), photograph(448, 448)]
SIZES = pytest.mark.parametrize("side", [36, 224, 448])


def config_of(side: int) -> MAEConfig:
    return MAEConfig((side, side), 4, dim=12, depth=1, heads=2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def evaluation_pixels(side: int) -> torch.Tensor:
    """Levels of the evaluation's crops, (B, 3, side, side)."""
    encoded = []
    for picture in PICTURES:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    widths, heights = np.array([picture.size for picture in PICTURES]).T
    samples = np.arange(len(PICTURES))
    sampler = AugmentSampler(0, Reading((side, side), None, 1).crop, (side, side))
    batch = EncodedBatch.of(encoded, sampler.at(samples, samples, widths, heights))
    return CpuDecoder(lambda _: batch, len(encoded), (side, side), 1, torch.device("cpu")).run().float()


def assert_equal_levels(side: int, normalised: list[torch.Tensor], config: MAEConfig) -> None:
    """At most two levels of 255 apart, because PIL and ATen round differently; a fiftieth on average."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    for expected, values in zip(evaluation_pixels(side), normalised, strict=True):
        difference = (255 * (values * std + mean) - expected).abs()
        assert difference.max() < 2.01 and difference.mean() < 0.02


@SIZES
@pytest.mark.parametrize("processor_class", [AutoImageProcessor, ViTImageProcessor])
def test_transformers_image_processor_gives_the_pixels_of_our_evaluation(
    tmp_path: Path, side: int, processor_class: type[AutoImageProcessor] | type[ViTImageProcessor]
) -> None:
    config = config_of(side)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config, "ViTMAEModel")))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hf_preprocessing(config)))
    processor = processor_class.from_pretrained(tmp_path)
    values = [processor(picture, return_tensors="pt")["pixel_values"][0] for picture in PICTURES]
    assert_equal_levels(side, values, config)


@SIZES
def test_timms_transform_gives_the_pixels_of_our_evaluation(side: int) -> None:
    config = config_of(side)
    settings = timm_config(config, "vit_base_patch16_224")["pretrained_cfg"]
    transform = create_transform(**resolve_data_config(pretrained_cfg=settings))
    assert_equal_levels(side, [transform(picture) for picture in PICTURES], config)
