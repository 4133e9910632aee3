"""Decoded images are PIL's for every kind of file, within the tolerances below."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

from maelstream.pipeline.augment_params import AugmentSampler
from maelstream.pipeline.config import CropConfig, DecodeConfig
from maelstream.pipeline.dali_graph import resized_windows
from maelstream.pipeline.dct_scaling import reduction
from maelstream.pipeline.decode import DECODERS, CpuDecoder, EncodedBatch, dali_inputs, decode_device
from maelstream.pipeline.output import Output
from maelstream.pipeline.pixel_augment import PixelAugment
from maelstream.shards.errors import MaelstreamError
from maelstream.shards.inspect import inspect
from tests.conftest import DEVICES, encoded, photograph

SIZE = (224, 224)
# Mean difference from PIL in levels of 255: nvJPEG's chroma upsampling and DALI's bicubic are not ATen's.
WITHIN = {"cpu": 0.5, "cuda": 2.0}
on_each_device = pytest.mark.parametrize("device", DEVICES)


def decode(batch: EncodedBatch, device: str = "cpu") -> torch.Tensor:
    decoder = DECODERS[device](lambda _: batch, len(batch.encoded), SIZE, 2, torch.device(device, 0))
    return decoder.run().cpu()


def decoded_by_pil(data: np.ndarray, window: np.ndarray, flip: bool) -> np.ndarray:
    """Decodes, crops, resizes (bicubic) and flips with PIL; (3, H, W)."""
    left, top, width, height = window.tolist()
    with Image.open(io.BytesIO(data.tobytes())) as image:
        crop = image.convert("RGB").crop((left, top, left + width, top + height))
    resized = np.asarray(crop.resize(SIZE[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    return resized[:, :, ::-1] if flip else resized


def random_crops(data: list[np.ndarray]) -> EncodedBatch:
    """A batch of these files with the windows and flips of the first epoch."""
    sizes = np.array([Image.open(io.BytesIO(item.tobytes())).size for item in data])
    samples = np.arange(len(data))
    params = AugmentSampler(0, CropConfig(), SIZE).at(np.zeros_like(samples), samples, sizes[:, 0], sizes[:, 1])
    return EncodedBatch.of(data, params)


def batch_of(
    data: list[np.ndarray], windows: np.ndarray, flips: np.ndarray, image_size: tuple[int, int] = SIZE
) -> EncodedBatch:
    """A batch of these windows, resized to `image_size` and not cropped further."""
    return EncodedBatch(data, windows, np.tile(np.array([*image_size, 0, 0], np.int32), (len(data), 1)), flips, None)


def difference_from_pil(batch: EncodedBatch, images: torch.Tensor) -> np.ndarray:
    """Mean absolute difference of each image in levels of 255."""
    rows = zip(batch.encoded, batch.windows, batch.flips, images.numpy(), strict=True)
    return np.array([np.abs(decoded_by_pil(*row[:3]).astype(int) - row[3]).mean() for row in rows])


def imagenet_files(folder: Path, count: int) -> list[np.ndarray]:
    return [np.fromfile(path, np.uint8) for path in sorted(folder.glob("*/*"))[:count]]


def test_imagenet_decoded_on_the_cpu_is_within_a_third_of_a_level_of_pil(imagenet_sample: Path) -> None:
    batch = random_crops(imagenet_files(imagenet_sample, 256))
    differences = difference_from_pil(batch, decode(batch))
    assert differences.mean() < 0.1
    assert (differences < 0.3).mean() > 0.98 and differences.max() < 1


@pytest.mark.parametrize("quality", [75, 95])
def test_generated_jpegs_are_within_a_third_of_a_level_of_pil(quality: int) -> None:
    sizes = [(300, 200), (64, 640), (901, 333), (223, 225), (30, 30)]
    batch = random_crops([encoded(photograph(*size, seed=k), "JPEG", quality=quality) for k, size in enumerate(sizes)])
    assert difference_from_pil(batch, decode(batch)).mean() < 0.3


@on_each_device
@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("P", "PNG", {}),
        ("RGB", "PNG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("LA", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "WEBP", {"quality": 80}),
        ("RGBA", "WEBP", {"lossless": True, "exact": True}),
        ("RGB", "BMP", {}),
        ("P", "BMP", {}),
        ("1", "BMP", {}),
    ],
)
def test_every_kind_of_file_decodes_as_in_pil(mode: str, form: str, options: dict, device: str) -> None:
    batch = random_crops([encoded(photograph().convert(mode), form, **options)])
    inspect(batch.encoded[0].tobytes())
    assert difference_from_pil(batch, decode(batch, device)).max() < WITHIN[device]


@on_each_device
def test_16_bit_images_are_scaled_to_8_bits_where_pil_clips(device: str) -> None:
    """PIL reads a gray 16-bit PNG correctly, but its conversion to RGB makes all values above 255 white."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data, window = encoded(Image.fromarray(values), "PNG"), np.array([[0, 0, 256, 256]], np.int32)
    source, on = lambda _: batch_of([data], window, NONE, (256, 256)), torch.device(device, 0)
    levels = DECODERS[device](source, 1, (256, 256), 1, on).run()[0, 0].cpu().numpy()
    assert np.abs(levels - np.round(values / 257)).max() <= (0 if device == "cpu" else 1)


@on_each_device
def test_images_of_one_pixel_are_decoded(device: str) -> None:
    for form in ("JPEG", "PNG", "WEBP", "BMP"):
        batch = batch_of(
            [encoded(Image.new("RGB", (1, 1), (200, 100, 50)), form)], np.array([[0, 0, 1, 1]], np.int32), NONE
        )
        assert difference_from_pil(batch, decode(batch, device)).max() <= (0 if device == "cpu" else 2)


@on_each_device
def test_the_exif_orientation_is_ignored_as_torchvision_does(device: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers rotate it by 90 degrees
    batch = random_crops([encoded(photograph(), "JPEG", exif=exif)])
    assert difference_from_pil(batch, decode(batch, device)).max() < WITHIN[device]


def test_a_flip_is_the_mirror_image() -> None:
    data, window = encoded(photograph(), "JPEG"), np.array([[10, 20, 200, 150]], np.int32)
    plain, flipped = (decode(batch_of([data], window, np.array([flip]))) for flip in (False, True))
    assert torch.equal(plain.flip(-1), flipped) and not torch.equal(plain, flipped)


def test_the_source_is_called_with_iteration_numbers_in_order() -> None:
    iterations = []

    def source(iteration: int) -> EncodedBatch:
        iterations.append(iteration)
        return batch_of([encoded(photograph(seed=iteration), "JPEG")], np.array([[0, 0, 300, 200]], np.int32), NONE)

    decoder = CpuDecoder(source, 1, SIZE, 1, torch.device("cpu"))
    images = [decoder.run() for _ in range(4)]
    assert iterations[:4] == [0, 1, 2, 3]
    for number, image in enumerate(images):
        alone = batch_of([encoded(photograph(seed=number), "JPEG")], np.array([[0, 0, 300, 200]], np.int32), NONE)
        assert torch.equal(image, decode(alone))


NONE = np.array([False])


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("form", ["window", "full"])
def test_the_gpu_graph_is_within_two_levels_of_pil(
    imagenet_sample: Path, form: Literal["window", "full"], device: str
) -> None:
    """nvJPEG's chroma upsampling and DALI's bicubic stay near PIL; without antialias the difference is 2.6 levels."""
    batch = random_crops(imagenet_files(imagenet_sample, 256))
    gpu = torch.device(device, 0)
    images = DECODERS[device](lambda _: batch, 256, SIZE, 2, gpu, config=DecodeConfig(form=form)).run().cpu()
    assert difference_from_pil(batch, images).mean() < 2


def images_as(output: Output) -> torch.Tensor:
    batch = random_crops([encoded(photograph(seed=seed), "JPEG") for seed in range(3)])
    return CpuDecoder(lambda _: batch, 3, SIZE, 2, torch.device("cpu"), output).run()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_images_are_normalised_in_any_dtype_and_layout(dtype: str, rtol: float, channels_last: bool) -> None:
    levels = images_as(Output())
    images = images_as(Output(dtype, channels_last))  # type: ignore[arg-type]
    mean, std = (torch.tensor(values)[:, None, None] for values in (Output().mean, Output().std))
    expected = (levels / 255 - mean) / std
    assert images.dtype == getattr(torch, dtype) and images.shape == (3, 3, *SIZE)
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    torch.testing.assert_close(images.float(), expected, rtol=rtol, atol=1e-6)


def test_memory_of_a_batch_is_reused_but_never_while_a_view_of_it_lives() -> None:
    number = iter(range(100))

    def source(_: int) -> EncodedBatch:
        return batch_of([encoded(photograph(seed=next(number)), "JPEG")], np.array([[0, 0, 300, 200]], np.int32), NONE)

    decoder = CpuDecoder(source, 1, SIZE, 1, torch.device("cpu"))
    first = decoder.run()
    view, kept = first[0, :, 5:9], first[0, :, 5:9].clone()
    del first
    for _ in range(5):
        decoder.run()
    assert torch.equal(view, kept)
    addresses = {decoder.run().data_ptr() for _ in range(5)}
    assert len(addresses) == 1


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (96, 110)])
def test_the_centre_crop_equals_that_of_torchvision_for_evaluation(
    imagenet_sample: Path, size: int, resized: int
) -> None:
    """Resize the short side, crop the centre; a window in whole pixels of the stored file may be half a pixel off."""
    data = imagenet_files(imagenet_sample, 64)
    evaluation = Compose([Resize(resized, InterpolationMode.BICUBIC), CenterCrop(size)])
    sides = np.array([Image.open(io.BytesIO(item.tobytes())).size for item in data])
    crop = CropConfig("none", margin=resized / size)
    params = AugmentSampler(0, crop, (size, size)).at(np.zeros(64, int), np.arange(64), sides[:, 0], sides[:, 1])
    batch = EncodedBatch.of(data, params)
    actual = CpuDecoder(lambda _: batch, 64, (size, size), 2, torch.device("cpu")).run().numpy().astype(int)
    by_torchvision = [
        np.asarray(evaluation(Image.open(io.BytesIO(d.tobytes())).convert("RGB"))).transpose(2, 0, 1) for d in data
    ]
    differences = np.abs(actual - np.stack(by_torchvision)).mean(axis=(1, 2, 3))
    assert np.median(differences) < 0.1 and differences.max() < 1 and not params.flips.any()


@pytest.mark.parametrize("form", ["window", "full"])
@pytest.mark.parametrize("kind", ["random_size", "fixed_size", "none"])
def test_the_gpu_graph_run_on_the_cpu_gives_nearly_the_same_images(imagenet_sample: Path, kind: str, form: str) -> None:
    """Only the decoder's device differs; DALI's bicubic is 0.2 levels from PIL's."""
    data = imagenet_files(imagenet_sample, 32)
    sides = np.array([Image.open(io.BytesIO(item.tobytes())).size for item in data])
    sampler = AugmentSampler(0, CropConfig(kind), SIZE)  # type: ignore[arg-type]
    params = sampler.at(np.zeros(32, int), np.arange(32), sides[:, 0], sides[:, 1])
    batch = EncodedBatch.of(data, params)
    pipeline = Pipeline(32, 2, device_id=None)
    with pipeline:
        pipeline.set_outputs(resized_windows(lambda _: dali_inputs(batch), SIZE, "cpu", form))
    pipeline.build()
    (images,) = pipeline.run()
    pixels = np.asarray(images.as_tensor()).transpose(0, 3, 1, 2).astype(int)
    differences = np.abs(pixels - decode(batch).numpy().astype(int))
    assert differences.mean(axis=(1, 2, 3)).max() < 1.5 and differences.mean() < 0.5


def test_jitter_equals_that_of_torchvision() -> None:
    data, window = encoded(photograph(), "JPEG"), np.array([[0, 0, 300, 200]], np.int32)
    batch = batch_of([data], window, NONE)
    factors, order = np.array([[1.3, 0.7, 1.2]]), np.array([[2, 0, 1]])
    params = PixelAugment(factors, order, None, None, None)
    plain, jittered = decode(batch), decode(replace(batch, pixel_augment=params))
    picture = Image.fromarray(plain[0].permute(1, 2, 0).numpy())
    for adjust, factor in ((adjust_saturation, 1.2), (adjust_brightness, 1.3), (adjust_contrast, 0.7)):
        picture = adjust(picture, factor)
    by_pil = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    assert (jittered.int() - by_pil.int()).abs().float().mean() < 1  # level, because PIL rounds after each adjustment


@pytest.mark.parametrize(("side", "worst"), [(112, 5.0), (56, 5.0), (24, 5.0)])
def test_decoding_at_a_dct_scale_differs_by_a_few_levels(imagenet_sample: Path, side: int, worst: float) -> None:
    """Windows smaller than twice the crop are decoded in full, bit for bit as without DCT scaling."""
    data = imagenet_files(imagenet_sample, 64)
    sides = np.array([Image.open(io.BytesIO(item.tobytes())).size for item in data])
    params = AugmentSampler(0, CropConfig(), (side, side)).at(
        np.zeros(64, int), np.arange(64), sides[:, 0], sides[:, 1]
    )
    batch = EncodedBatch.of(data, params)
    plain, scaled = (
        CpuDecoder(
            lambda _: batch, 64, (side, side), 2, torch.device("cpu"), config=DecodeConfig(dct_scaling=scaling)
        ).run()
        for scaling in (False, True)
    )
    times = np.array([reduction(*row) for row in zip(data, params.windows, params.resizes, strict=True)])
    differences = (plain.float() - scaled.float()).abs().mean(dim=(1, 2, 3)).numpy()
    assert (differences[times == 1] == 0).all() and 0 < differences[times > 1].mean() < worst
    assert (times > 1).mean() > 0.5


def test_only_jpegs_with_large_windows_are_decoded_at_a_dct_scale() -> None:
    files = [encoded(photograph(), "PNG"), encoded(photograph().convert("CMYK"), "JPEG")]
    window, resize = np.array([0, 0, 300, 200], np.int32), np.array([32, 32, 0, 0], np.int32)
    assert [reduction(data, window, resize) for data in files] == [1, 1]
    sizes = [np.array([0, 0, side, side], np.int32) for side in (63, 64, 127, 128, 256, 2000)]
    jpeg = encoded(photograph().convert("L"), "JPEG")
    assert [reduction(jpeg, size, resize) for size in sizes] == [1, 2, 2, 4, 8, 8]


def test_a_damaged_file_at_a_dct_scale_raises_as_with_dali() -> None:
    data = encoded(photograph(), "JPEG").tobytes()
    table = data.index(b"\xff\xc4")
    cut = np.frombuffer(data[:table] + b"\xff\xc4\x00\x1f" + b"\xff" * 20 + data[table + 24 :], np.uint8)
    batch = batch_of([cut], np.array([[0, 0, 300, 200]], np.int32), NONE, (32, 32))
    decoder = CpuDecoder(lambda _: batch, 1, (32, 32), 1, torch.device("cpu"), config=DecodeConfig(dct_scaling=True))
    with pytest.raises(RuntimeError):
        decoder.run()


def test_decoding_on_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MaelstreamError, match=r"`decode\.on: gpu` needs a GPU, and torch finds none"):
        decode_device(DecodeConfig(on="gpu"))
    assert decode_device(DecodeConfig()) == decode_device(DecodeConfig(on="cpu")) == torch.device("cpu")
