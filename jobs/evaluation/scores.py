"""Top-1 and top-5 accuracy of classifiers; every image of a validation set counts exactly once on any number of ranks.

Hits are counted as integers, so the sum does not depend on the number of ranks. torchmetrics does not handle images
that cannot be decoded: here they stay in the denominator, and their names are reported.
"""

import json
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from maelstream.jobs.distributed.ranks import ControlGroup
from maelstream.jobs.evaluation.results import Scores
from maelstream.model.patches import normalise
from maelstream.pipeline.eval_pass import Reading, every_image
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset

Classify = Callable[[UInt8[Tensor, "b 3 h w"]], Float[Tensor, "heads b classes"]]
"""A function from decoded images, on the decoder's device, to the logits of one or more classifiers."""


@torch.no_grad()
def scores(classify: Classify, dataset: Dataset, reading: Reading, control_group: ControlGroup) -> list[Scores]:
    """The scores of each head of `classify` on all images of a dataset with the same classes; the same on every rank.

    Every rank calls `classify` equally often, always with the same number of images.

    Raises:
        MaelstreamError: fewer images than ranks, or a dataset that cannot be read.
    """
    bad: list[BadSample] = []
    counts = torch.zeros(1, 2, dtype=torch.int64)
    for portion in every_image(dataset, reading, control_group.ranks.rank, control_group.ranks.world_size, bad.append):
        logits = classify(portion.images)  # (heads, B, classes)
        labels = torch.from_numpy(dataset.label[portion.samples]).long().to(logits.device)
        counted = torch.from_numpy(portion.counted).to(logits.device)
        correct = hits(logits, labels) & counted[:, None]  # (heads, B, 2)
        counts = counts.to(logits.device) + correct.sum(1)  # stays on the device, to avoid a synchronisation per batch
    sums = control_group.sums([float(count) for count in counts.flatten().tolist()])
    undecodable = gather_undecodable(bad, control_group)
    size = len(dataset)
    return [
        Scores(100 * top1 / size, 100 * top5 / size, size, undecodable)
        for top1, top5 in zip(sums[::2], sums[1::2], strict=True)
    ]


def hits(logits: Float[Tensor, "*heads b classes"], labels: Int64[Tensor, "b"]) -> Bool[Tensor, "*heads b 2"]:
    """Whether the label is ranked first, and whether it is among the first five.

    Among equal logits, the lower class is ranked first. NaN is ranked before all numbers, so a diverged model scores 0.
    """
    classes = torch.arange(logits.shape[-1], device=logits.device)
    own = logits.gather(-1, labels[:, None].expand(*logits.shape[:-1], 1))
    before = (logits > own) | ((logits == own) & (classes < labels[:, None])) | logits.isnan()
    rank = before.sum(-1)  # (*heads, B)
    return torch.stack([rank < 1, rank < 5], -1)


def gather_undecodable(bad: list[BadSample], control_group: ControlGroup) -> tuple[str, ...]:
    """The texts of all ranks' bad samples, each sample once, in ascending order; the same on every rank."""
    texts = control_group.all_texts(json.dumps([(each.sample, str(each)) for each in bad]))
    return tuple(dict(sorted((sample, text) for each in texts for sample, text in json.loads(each))).values())


def classify_with(model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> Classify:
    """A function for `scores` that normalises images and applies `model` on the device of its parameters."""
    device = next(model.parameters()).device

    def classify(images: Tensor) -> Tensor:
        logits = model(normalise(images.to(device), mean, std))
        return logits if logits.ndim == 3 else logits[None]

    return classify
