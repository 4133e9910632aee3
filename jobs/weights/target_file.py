"""Target files: what the targets "pca" and "token" compare with, as `maelstream fit-pca` and `fit-tokenizer` write it.

A safetensors file with a fingerprint of its tensors, so that a damaged one is found. A run keeps a copy of its own and
never takes another file's: the fingerprint is part of the experiment, the path is not. The published encoder of DALL-E
is read too, as a state_dict.
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
from maelstream.shards.durable import written_whole

FIT_COMMANDS = {"pca": "fit-pca", "token": "fit-tokenizer"}
_DECODER, _NOTES = "decoder.", "maelstream"


@dataclass(frozen=True)
class TargetFile:
    """The content of a target file."""

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    """How it was fitted: `kind`, and what the command notes; values that JSON has."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes, dtypes and numbers, whatever file holds them."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """As a safetensors file, whole or not at all."""
        notes = self.settings | {"fingerprint": self.fingerprint}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(save(tensors, {_NOTES: json.dumps(notes)}))  # one entry: safetensors writes several in any order

    def target(self, config: MAEConfig) -> PCATarget | TokenTarget:
        """The frozen target of `config`; RecipeError where the file is for another model."""
        if (kind := self.settings["kind"]) != config.target:
            raise RecipeError(f"{self.path} holds the target {kind}, the recipe's model.target is {config.target}")
        return self._pca(config) if kind == "pca" else self._tokens(config)

    def _pca(self, config: MAEConfig) -> PCATarget:
        self._refuse(
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
            shape = TokenizerConfig.of(self.tensors)
            self._refuse({"in_chans": (shape.in_chans, config.in_chans), "codes": (shape.codes, config.codes)})
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
        except (ValueError, RuntimeError) as error:  # the latter lists names over several lines
            raise RecipeError(f"{self.path} holds no tokenizer ({' '.join(str(error).split())[:200]})") from None
        return TokenTarget(encoder, decoder, config.grid, config.patch_size, config.mean, config.std)

    @property
    def shows_pixels(self) -> bool:
        """Whether predictions of this target can be turned into pixels."""
        return self.settings["kind"] == "pca" or any(name.startswith(_DECODER) for name in self.tensors)

    def _refuse(self, values: dict[str, tuple[Any, Any]]) -> None:
        for name, (here, wanted) in values.items():
            if here != wanted:
                raise RecipeError(
                    f"{self.path} was made for {name} {here}, the recipe's model.{name} is {wanted}; take that value, "
                    f"or `maelstream {FIT_COMMANDS[self.settings['kind']]}` for this one"
                )


def tokenizer_file(path: Path, encoder: Encoder, decoder: Decoder, settings: dict[str, Any]) -> TargetFile:
    """Of a tokenizer that was trained here."""
    weights = encoder.state_dict() | {_DECODER + name: weight for name, weight in decoder.state_dict().items()}
    return TargetFile(path, {name: weight.cpu() for name, weight in weights.items()}, {"kind": "token", **settings})


def read_target_file(path: Path) -> TargetFile:
    """A fitted target, or an encoder of DALL-E's names; RecipeError when it is neither, or damaged."""
    if path.suffix != ".safetensors":
        return TargetFile(path, _state_dict(path), {"kind": "token"})
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = json.loads((file.metadata() or {}).get(_NOTES, "{}"))  # none in others', DALL-E's encoder say
    except (SafetensorError, ValueError, OSError) as error:
        raise RecipeError(f"{path} is no target file ({error}); fit it again") from None
    fingerprint = settings.pop("fingerprint", None)
    found = TargetFile(path, tensors, {"kind": "token"} | settings)
    if fingerprint not in (None, found.fingerprint):
        raise RecipeError(
            f"{path} is damaged: its numbers are not those that were written; put back a whole copy, or fit it again"
        )
    return found


def target_of_run(recipe: Recipe, folder: RunFolder) -> TargetFile | None:
    """What a run compares with: the recipe's file, or when it goes on the copy in its folder; None for pixels.

    Raises:
        RecipeError: no file, one for another model, or another one than the run began with.
    """
    kind, given = recipe.model.target, Path(recipe.target_file)
    resumed, kept = folder.config.exists(), folder.target_file
    if kind not in FIT_COMMANDS:
        if recipe.target_file:
            raise RecipeError(f"target_file {given}: the target {kind} takes none; model.target is pca or token")
        return None
    if not resumed and not given.is_file():
        wanted = f"target_file {given} is missing" if recipe.target_file else f"the target {kind} needs a target_file"
        raise RecipeError(
            f"{wanted}; `maelstream {FIT_COMMANDS[kind]} {recipe.data.dataset} --recipe RECIPE "
            f"--out {recipe.target_file or 'FILE.safetensors'}` writes one"
        )
    if resumed and not kept.is_file():
        raise RecipeError(
            f"{kept} is missing, and the run cannot go on with another; put it back, or give another --run"
        )
    found = read_target_file(kept if resumed else given)
    if resumed and given.is_file() and (other := read_target_file(given)).fingerprint != found.fingerprint:
        raise RecipeError(
            f"{folder.path} holds a run with another target_file than {given} (fingerprint {found.fingerprint[:12]}, "
            f"now {other.fingerprint[:12]}); give that file again, its copy {kept}, or another --run"
        )
    return found


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RecipeError(
            f"{path} is a pickled module, which may run code; if you trust it and have DALL-E's package installed, "
            f"take its weights out: python -c \"import torch; torch.save(torch.load('{path}', map_location='cpu', "
            "weights_only=False).state_dict(), 'encoder.pt')\""
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise RecipeError(f"{path} cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise RecipeError(f"{path} holds no state_dict: names and tensors")
    return values
