"""Target files: the PCA or tokenizer that the targets "pca" and "token" are computed with.

`maelstream fit-pca` and `fit-tokenizer` write them as safetensors files with a fingerprint, which detects damage. A run
keeps its own copy and rejects any other file: the fingerprint is part of the experiment, the path is not. The published
encoder of DALL-E is read too, as a state_dict.
"""

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from maelstream.jobs.recipe import Recipe, RecipeError
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.model.config import MAEConfig
from maelstream.model.targets import PCATarget, TokenTarget
from maelstream.model.tokenizer import Decoder, Encoder, TokenizerConfig
from maelstream.shards.durable import atomic_write

FIT_COMMANDS = {"pca": "fit-pca", "token": "fit-tokenizer"}
_DECODER, _METADATA = "decoder.", "maelstream"


@dataclass(frozen=True)
class TargetFile:
    """The content of a target file."""

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    """How the target was fitted: its `kind` and the options of the command, as JSON values."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors' names, shapes, dtypes and values; it does not depend on the file format."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Writes a safetensors file, completely or not at all."""
        metadata = self.settings | {"fingerprint": self.fingerprint}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            # A single metadata entry, because safetensors writes several in an undefined order.
            file.write(save(tensors, {_METADATA: json.dumps(metadata)}))

    def target(self, config: MAEConfig) -> PCATarget | TokenTarget:
        """The frozen target for a model of `config`; RecipeError when the file is for another model."""
        if (kind := self.settings["kind"]) != config.target:
            raise RecipeError(f"{self.path} holds the target {kind}, the recipe's model.target is {config.target}")
        return self._pca(config) if kind == "pca" else self._tokens(config)

    def _pca(self, config: MAEConfig) -> PCATarget:
        self._check_equal(
            {
                "patch_size": (self.settings["patch_size"], config.patch_size),
                "in_chans": (self.settings["in_chans"], config.in_chans),
                "components": (len(self.tensors["components"]), config.components),
                "mean": (tuple(self.settings["mean"]), config.mean),
                "std": (tuple(self.settings["std"]), config.std),
            }
        )
        components = self.tensors["components"]
        return PCATarget(components, self.tensors["mean"], self.tensors["variances"][: len(components)])

    def _tokens(self, config: MAEConfig) -> TokenTarget:
        try:
            shape = TokenizerConfig.from_weights(self.tensors)
            self._check_equal({"in_chans": (shape.in_chans, config.in_chans), "codes": (shape.codes, config.codes)})
            with torch.device("meta"):
                encoder, decoder = Encoder(shape), Decoder(shape) if self.shows_pixels else None
            encoder.load_state_dict(
                {name: tensor for name, tensor in self.tensors.items() if not name.startswith(_DECODER)}, assign=True
            )
            if decoder is not None:
                weights = {
                    name.removeprefix(_DECODER): t for name, t in self.tensors.items() if name.startswith(_DECODER)
                }
                decoder.load_state_dict(weights, assign=True)
        except (ValueError, RuntimeError) as error:  # a RuntimeError lists names on several lines
            raise RecipeError(f"{self.path} holds no tokenizer ({' '.join(str(error).split())[:200]})") from None
        return TokenTarget(encoder, decoder, config.grid, config.patch_size, config.mean, config.std)

    @property
    def shows_pixels(self) -> bool:
        """Whether predictions of this target can be shown as pixels."""
        return self.settings["kind"] == "pca" or any(name.startswith(_DECODER) for name in self.tensors)

    def _check_equal(self, values: dict[str, tuple[Any, Any]]) -> None:
        """Raises RecipeError at the first name whose two values differ: (the file's, the recipe's)."""
        for name, (found, expected) in values.items():
            if found != expected:
                raise RecipeError(
                    f"{self.path} was made for {name} {found}, the recipe's model.{name} is {expected}; use the file's "
                    f"value, or run `maelstream {FIT_COMMANDS[self.settings['kind']]}` for this recipe"
                )


def tokenizer_file(path: Path, encoder: Encoder, decoder: Decoder, settings: dict[str, Any]) -> TargetFile:
    """The target file of a trained tokenizer; `settings` say how it was trained."""
    weights = encoder.state_dict() | {_DECODER + name: weight for name, weight in decoder.state_dict().items()}
    return TargetFile(path, {name: weight.cpu() for name, weight in weights.items()}, {"kind": "token", **settings})


def read_target_file(path: Path) -> TargetFile:
    """Reads a fitted target, or a tokenizer encoder with DALL-E's names.

    Raises:
        RecipeError: a file of another kind, or a damaged one.
    """
    if path.suffix != ".safetensors":
        return TargetFile(path, _state_dict(path), {"kind": "token"})
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # Files from elsewhere, such as DALL-E's encoder, have no metadata.
            settings = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise RecipeError(f"{path} is not a target file ({error}); fit it again") from None
    fingerprint = settings.pop("fingerprint", None)
    found = TargetFile(path, tensors, {"kind": "token"} | settings)
    if fingerprint not in (None, found.fingerprint):
        raise RecipeError(f"{path} is damaged: its values differ from its fingerprint; restore a copy, or fit it again")
    return found


def run_target_file(recipe: Recipe, folder: RunFolder) -> TargetFile | None:
    """Reads the target file of a run: the recipe's file, or the copy in the folder of a resumed run; None for pixels.

    Raises:
        RecipeError: no file, one that the recipe's target does not use, or one that differs from the run's copy.
    """
    kind, given = recipe.model.target, Path(recipe.target_file)
    resumed, own_copy = folder.config.exists(), folder.target_file
    if kind not in FIT_COMMANDS:
        if recipe.target_file:
            raise RecipeError(
                f"target_file {given}: the target {kind} uses none; remove it, or set model.target to pca or token"
            )
        return None
    if not resumed and not given.is_file():
        problem = f"target_file {given} is missing" if recipe.target_file else f"the target {kind} needs a target_file"
        raise RecipeError(
            f"{problem}; `maelstream {FIT_COMMANDS[kind]} {recipe.data.dataset} --recipe RECIPE "
            f"--out {recipe.target_file or 'FILE.safetensors'}` writes one"
        )
    if resumed and not own_copy.is_file():
        raise RecipeError(
            f"{own_copy} is missing, and the run cannot resume with another; restore it, or give another --run"
        )
    found = read_target_file(own_copy if resumed else given)
    if resumed and given.is_file() and (other := read_target_file(given)).fingerprint != found.fingerprint:
        raise RecipeError(
            f"{folder.path} holds a run with another target_file than {given} (fingerprint {found.fingerprint[:12]}, "
            f"now {other.fingerprint[:12]}); give the original file, its copy {own_copy}, or another --run"
        )
    return found


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RecipeError(
            f"{path} is a pickled module, which may run code; if you trust it and have DALL-E's package installed, "
            f"extract its weights: python -c \"import torch; torch.save(torch.load('{path}', map_location='cpu', "
            "weights_only=False).state_dict(), 'encoder.pt')\""
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise RecipeError(f"{path} cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise RecipeError(f"{path} holds no state_dict (a dict of names and tensors); give a file that does")
    return values
