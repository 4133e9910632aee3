"""The model card of an export: what it is, from which recipe and step, what each file holds, how to load it."""

from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import yaml

from maelstream.jobs.recipe import EXPERIMENT, DataConfig, dump_recipe
from maelstream.jobs.run_folder.folder import RunFolder

_LICENCE = """\
maelstream, which trained these weights, is Apache-2.0 and claims nothing on them. Their licence is for you to choose,
as far as the terms of the dataset allow; put it above as `license:` before you publish them. They are not the weights
that the paper's authors published, which are CC BY-NC 4.0."""


@dataclass(frozen=True)
class Card:
    """What a format adds to the card."""

    library: str
    files: dict[str, str]
    """Name of each file, and what it holds."""
    load: str
    """Python that loads them, run inside the folder."""


def model_card(folder: RunFolder, step: int, model: str, card: Card) -> str:
    """README.md of an export of `step`, in the form that model hubs read; `model` says what it is in a few words."""
    recipe = folder.recipe()
    recipe = replace(recipe, data=without_paths(recipe.data))
    config, logged = recipe.model, [line for line in folder.read_metrics() if line["step"] <= step]
    loss = (
        f"loss {logged[-1]['loss']:.4f} on removed patches at step {logged[-1]['step']}" if logged else "no loss logged"
    )
    datasets = ", ".join(recipe.data.mix or [recipe.data.stream.urls or recipe.data.dataset])
    values = yaml.safe_load(dump_recipe(recipe))
    experiment = yaml.safe_dump({name: values[name] for name in EXPERIMENT}, sort_keys=False)
    files = "\n".join(f"| `{name}` | {what} |" for name, what in card.files.items())
    return f"""\
---
library_name: {card.library}
tags:
- masked-autoencoder
- maelstream
---
# {model}

A masked autoencoder ([arXiv 2111.06377](https://arxiv.org/abs/2111.06377)), pre-trained by maelstream without labels:
step {step}, {loss} (target {config.target}, {config.mask_ratio:.0%} removed), on {datasets}.

| file | what |
|---|---|
{files}

## Load

```python
{card.load}
```

Pixels are RGB scaled to 0..1, less {list(config.mean)}, over {list(config.std)}.

## Recipe

```yaml
{experiment}```

## Licence

{_LICENCE}
"""


def without_paths(data: DataConfig) -> DataConfig:
    """Datasets and shards by their last name: where they lie is nobody's business."""
    mix: dict[str, float] = {}
    for path, weight in data.mix.items():
        name = PurePosixPath(path).name
        mix[f"{name} ({len(mix) + 1})" if name in mix else name] = weight
    stream = replace(data.stream, urls=PurePosixPath(data.stream.urls).name)
    return replace(data, dataset=PurePosixPath(data.dataset).name, mix=mix, stream=stream)
