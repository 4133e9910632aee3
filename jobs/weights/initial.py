"""The weights that a pre-training run starts from, instead of random ones: `maelstream pretrain RECIPE --init WEIGHTS`.

The run keeps its own copy, and the SHA-256 of the original in its recipe, so it resumes without the original. The
weights are those of an encoder, or of an encoder and a decoder; a missing decoder starts with random weights. Position
tables are never copied: the model computes its own sine-cosine tables, exactly, for any grid.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from maelstream.jobs.checkpointing.digest import CHUNK
from maelstream.jobs.recipe import Recipe, RecipeError
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.errors import WeightsError
from maelstream.jobs.weights.reading import StoredWeights, check_known, check_shapes, read_weights, weights_file
from maelstream.jobs.weights.tensor_files import files_of, read_file, report
from maelstream.model.config import MAEConfig
from maelstream.model.formats import has_decoder, without_decoder
from maelstream.model.mae import MAE
from maelstream.model.position import sincos_table
from maelstream.shards.durable import atomic_write

_TABLES = ("pos_embed", "decoder_pos_embed")
_TABLE_TOLERANCE = 5e-3  # a table that was cast to bf16 differs by 2e-3


@dataclass(frozen=True)
class InitialWeights:
    """Parameters to start from, float32, by the reference's names; those of the decoder may be missing."""

    tensors: dict[str, Tensor]

    def write(self, path: Path) -> None:
        """Writes a safetensors file, completely or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(save(self.tensors))


def initial_weights(recipe: Recipe, folder: RunFolder) -> tuple[Recipe, InitialWeights | None]:
    """The recipe with what the run records about `init`, and the weights to start from.

    The weights are None for a random start, and for a run that has a checkpoint. A run that exists keeps the weights
    that it started from: `init` may then be empty or name the same weights.

    Raises:
        RecipeError: other weights than those that the run started from.
        WeightsError: weights that cannot be read or do not fit the recipe's model.
    """
    if not folder.config.exists():
        if not recipe.init:
            return replace(recipe, init_sha256=""), None
        stored = read_weights(recipe.init)
        weights = InitialWeights(_parameters(stored, recipe.model))
        return replace(recipe, init_sha256=sha256_of(stored.file)), weights
    old = folder.recipe()
    _check_same_start(recipe, old, folder)
    recipe = replace(recipe, init=old.init, init_sha256=old.init_sha256)
    if not old.init or folder.checkpoints.steps():
        return recipe, None
    if not folder.initial_weights.is_file():
        raise RecipeError(
            f"{folder.initial_weights} is missing, and the run has no checkpoint yet: restore it, or give another --run"
        )
    return recipe, InitialWeights(read_file(folder.initial_weights).tensors)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file of weights; of an index, that of its shards one after another."""
    digest = hashlib.sha256()
    for part in files_of(file):
        with part.open("rb") as opened:
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _check_same_start(recipe: Recipe, old: Recipe, folder: RunFolder) -> None:
    if not recipe.init or (recipe.init == old.init and not Path(recipe.init).is_file()):
        return  # the same folder may hold newer weights by now, or none
    began = f"from {old.init} (SHA-256 {old.init_sha256[:12]})" if old.init else "from random weights"
    found = sha256_of(weights_file(Path(recipe.init))) if old.init else ""
    if not old.init or found != old.init_sha256:
        other = f" (SHA-256 {found[:12]})" if found else ""
        raise RecipeError(
            f"{folder.path} holds a run that started {began}, not from --init {recipe.init}{other}; leave out --init "
            "to resume it, or give another --run"
        )


def _parameters(stored: StoredWeights, config: MAEConfig) -> dict[str, Tensor]:
    """The parameters of `MAE(config)` that `stored` has; WeightsError if it is another model."""
    with torch.device("meta"):
        expected = {name: tensor.detach() for name, tensor in MAE(config).named_parameters()}
    if not (with_decoder := has_decoder(stored.tensors)):
        expected = without_decoder(expected)
    found = {name: tensor.float() for name, tensor in stored.tensors.items() if name not in _TABLES}
    check_shapes(replace(stored, tensors=found), expected)
    check_known(stored, config, "heads", "mean", "std", *(["decoder_heads"] if with_decoder else []))
    _check_tables(stored, config)
    if not with_decoder:
        report(f"{stored.file}: the run starts from this encoder; the decoder has random weights")
    return found


def _check_tables(stored: StoredWeights, config: MAEConfig) -> None:
    """Raises WeightsError unless each position table is the sine-cosine table of its grid."""
    for name in _TABLES:
        if (table := stored.tensors.get(name)) is None:
            continue
        grid = stored.grid or config.grid
        expected = sincos_table(grid, table.shape[-1])
        if table.shape != expected.shape or (table.float() - expected).abs().max() > _TABLE_TOLERANCE:
            raise WeightsError(
                f"{stored.file}: {name} is not the sine-cosine table of {grid[0]} x {grid[1]} patches, so it was "
                "trained; pre-training has a fixed table and cannot continue from such weights"
            )
    if stored.grid is not None and stored.grid != config.grid:
        report(f"{stored.file}: trained on {stored.grid} patches; the position tables of {config.grid} are computed")
