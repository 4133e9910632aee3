"""The model card of an export: the model, its recipe and step, its files, and how to load them."""

from dataclasses import replace
from pathlib import PurePosixPath

import yaml

from maelstream.jobs.recipe import EXPERIMENT, ClassificationRecipe, DataConfig, LabelledData, Recipe, dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.export_formats import FormatCard
from maelstream.model.config import MAEConfig

_LICENCE = """\
maelstream, which trained these weights, is Apache-2.0 and makes no claim on them. You choose their licence, as far as
the terms of the dataset allow; add it above as `license:` before you publish them. They are not the weights that the
paper's authors published, which are CC BY-NC 4.0."""


def model_card(folder: RunFolder, step: int, model: str, card: FormatCard) -> str:
    """The README.md of an export of `step`, in the form that model hubs read; `model` describes the model briefly."""
    recipe = folder.any_recipe()
    keys: tuple[str, ...]
    pixels: MAEConfig | LabelledData
    if isinstance(recipe, Recipe):
        tags, keys, pixels = ["masked-autoencoder"], EXPERIMENT, recipe.model
        recipe = replace(recipe, data=without_paths(recipe.data))
        text = _pre_training(folder, recipe, step)
    else:
        tags, keys, pixels = ["image-classification"], (*EXPERIMENT, "tuning", "mixup"), recipe.data
        train, val = (PurePosixPath(path).name for path in (recipe.data.train, recipe.data.val))
        recipe = replace(recipe, data=replace(recipe.data, train=train, val=val))
        text = _classification(folder, recipe, step)
    values = yaml.safe_load(dump_recipe(recipe))
    experiment = yaml.safe_dump({name: values[name] for name in keys}, sort_keys=False)
    files = "\n".join(f"| `{name}` | {content} |" for name, content in card.files.items())
    return f"""\
---
library_name: {card.library}
tags:
{"".join(f"- {tag}{chr(10)}" for tag in tags)}- maelstream
---
# {model}

{text}

| file | content |
|---|---|
{files}

## Load

```python
{card.load}
```

Pixels are RGB, scaled to 0..1, minus {list(pixels.mean)}, divided by {list(pixels.std)}.

## Recipe

```yaml
{experiment}```

## Licence

{_LICENCE}
"""


def _pre_training(folder: RunFolder, recipe: Recipe, step: int) -> str:
    config, logged = recipe.model, [line for line in folder.read_metrics() if line["step"] <= step]
    loss = (
        f"loss {logged[-1]['loss']:.4f} on removed patches at step {logged[-1]['step']}" if logged else "no loss logged"
    )
    datasets = ", ".join(recipe.data.mix or [recipe.data.stream.urls or recipe.data.dataset])
    start = (
        f", from the weights {PurePosixPath(recipe.init).name} (SHA-256 {recipe.init_sha256})" if recipe.init else ""
    )
    return f"""\
A masked autoencoder ([arXiv 2111.06377](https://arxiv.org/abs/2111.06377)), pre-trained without labels by maelstream:
step {step}, {loss} (target {config.target}, {config.mask_ratio:.0%} removed), on {datasets}{start}."""


def _classification(folder: RunFolder, recipe: ClassificationRecipe, step: int) -> str:
    logged = [line for line in folder.read_metrics() if line["step"] <= step and "top1" in line]
    score = (
        f"top-1 {logged[-1]['top1']:.2f} % and top-5 {logged[-1]['top5']:.2f} % on {recipe.data.val} at step "
        f"{logged[-1]['step']}"
        if logged
        else "not evaluated yet"
    )
    encoder = "without pre-training"
    if recipe.weights:
        at_step = "" if recipe.weights_step is None else f" at step {recipe.weights_step}"
        encoder = f"from the encoder {PurePosixPath(recipe.weights).name}{at_step}"
    pooled = "the mean of the patch tokens" if recipe.model.pool == "mean" else "the class token"
    probe = " The linear probe's BatchNorm is folded into the head." if recipe.tuning.probe else ""
    return f"""\
A ViT that classifies {pooled} into {recipe.model.classes} classes, trained by `maelstream {recipe.job}` on
{recipe.data.train}, {encoder}: step {step}, {score}.{probe}"""


def without_paths(data: DataConfig) -> DataConfig:
    """Replaces each path of a dataset or shard by its last part, because a published card must not show local paths."""
    mix: dict[str, float] = {}
    for path, weight in data.mix.items():
        name = PurePosixPath(path).name
        mix[f"{name} ({len(mix) + 1})" if name in mix else name] = weight
    stream = replace(data.stream, urls=PurePosixPath(data.stream.urls).name)
    return replace(data, dataset=PurePosixPath(data.dataset).name, mix=mix, stream=stream)
