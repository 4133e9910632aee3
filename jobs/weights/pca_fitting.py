"""Fits the principal components of patches for the target "pca"; the body of `maelstream fit-pca`."""

from pathlib import Path

from rich.console import Console
from rich.progress import track

from maelstream.jobs.recipe import Recipe, RecipeError
from maelstream.jobs.training.image_stream import image_stream
from maelstream.jobs.weights.target_file import TargetFile
from maelstream.model.patches import patchify
from maelstream.model.pca import PatchMoments, PrincipalComponents, principal_components
from maelstream.pipeline.decode import decode_device
from maelstream.shards.dataset import Dataset

_BATCH = 64  # images per batch; the result does not depend on it


def fit(
    dataset: Dataset, recipe: Recipe, images: int, threads: int, out: Path
) -> tuple[TargetFile, PrincipalComponents]:
    """Fit the components; they are bit-identical for any number of threads.

    Raises:
        RecipeError: the images have too few patches, or all patches are equal.
    """
    config, count, batch = recipe.model, min(images, len(dataset)), min(_BATCH, len(dataset))
    moments = PatchMoments(config.patch_dim, decode_device(recipe.loader.decode))
    with image_stream(dataset, recipe, batch, threads) as batches:
        for start in track(range(0, count, batch), "patches", console=Console(stderr=True, markup=False, emoji=False)):
            moments.add(patchify(next(batches)[: count - start], config.patch_size))
    try:
        found = principal_components(moments, config.components, config.mean, config.std)
    except ValueError as error:
        raise RecipeError(f"--images {images}: {error}") from None
    tensors = {"components": found.components, "mean": found.mean, "variances": found.variances}
    settings = {
        "kind": "pca",
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "mean": config.mean,
        "std": config.std,
        "image_size": config.image_size,
        "dataset": dataset.fingerprint,
        "images": count,
    }
    return TargetFile(out, {name: tensor.float() for name, tensor in tensors.items()}, settings), found
