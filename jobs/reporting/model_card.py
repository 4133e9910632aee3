"""The model card of an export: the model, its recipe and step, its files, and how to load them."""

from dataclasses import replace
from pathlib import PurePosixPath

import yaml

from maelstream.jobs.recipe import EXPERIMENT, DataConfig, dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.export_formats import FormatCard

_LICENCE = """\
maelstream, which trained these weights, is Apache-2.0 and makes no claim on them. You choose their licence, as far as
the terms of the dataset allow; add it above as `license:` before you publish them. They are not the weights that the
paper's authors published, which are CC BY-NC 4.0."""


def model_card(folder: RunFolder, step: int, model: str, card: FormatCard) -> str:
    """The README.md of an export of `step`, in the form that model hubs read; `model` describes the model briefly."""
    recipe = folder.recipe()
    recipe = replace(recipe, data=without_paths(recipe.data))
    config, logged = recipe.model, [line for line in folder.read_metrics() if line["step"] <= step]
    loss = (
        f"loss {logged[-1]['loss']:.4f} on removed patches at step {logged[-1]['step']}" if logged else "no loss logged"
    )
    datasets = ", ".join(recipe.data.mix or [recipe.data.stream.urls or recipe.data.dataset])
    values = yaml.safe_load(dump_recipe(recipe))
    experiment = yaml.safe_dump({name: values[name] for name in EXPERIMENT}, sort_keys=False)
    files = "\n".join(f"| `{name}` | {content} |" for name, content in card.files.items())
    return f"""\
---
library_name: {card.library}
tags:
- masked-autoencoder
- maelstream
---
# {model}

A masked autoencoder ([arXiv 2111.06377](https://arxiv.org/abs/2111.06377)), pre-trained without labels by maelstream:
step {step}, {loss} (target {config.target}, {config.mask_ratio:.0%} removed), on {datasets}.

| file | content |
|---|---|
{files}

## Load

```python
{card.load}
```

Pixels are RGB, scaled to 0..1, minus {list(config.mean)}, divided by {list(config.std)}.

## Recipe

```yaml
{experiment}```

## Licence

{_LICENCE}
"""


def without_paths(data: DataConfig) -> DataConfig:
    """Replaces each path of a dataset or shard by its last part, because a published card must not show local paths."""
    mix: dict[str, float] = {}
    for path, weight in data.mix.items():
        name = PurePosixPath(path).name
        mix[f"{name} ({len(mix) + 1})" if name in mix else name] = weight
    stream = replace(data.stream, urls=PurePosixPath(data.stream.urls).name)
    return replace(data, dataset=PurePosixPath(data.dataset).name, mix=mix, stream=stream)
