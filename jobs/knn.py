"""`maelstream knn WEIGHTS TRAIN VAL`: top-1 and top-5 of the nearest neighbours of frozen features; nothing is trained.

Every rank holds the features of all validation images, goes through its share of the training images, and keeps for
each validation image the k nearest that it has met; then the ranks put theirs together. Memory a rank does not grow
with the training set: 4 bytes for each number of a validation image's features (50,000 of ViT-L: 205 MB, twice on a
GPU's machine), 8 for each of its neighbours, and some 20 for each pair of 8,192 of them and a micro-batch.
"""

import maelstream.jobs.distributed.parent_death  # noqa: F401  before anything slow is imported

# isort: split
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from jaxtyping import Float32, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from maelstream.jobs.arguments import parsed
from maelstream.jobs.command import run
from maelstream.jobs.distributed.ranks import AgreedError, ControlGroup, process_group, ranks_from_environment
from maelstream.jobs.evaluation.classify import check_datasets
from maelstream.jobs.evaluation.options import Measuring
from maelstream.jobs.evaluation.results import Evaluation, record
from maelstream.jobs.evaluation.scores import Scores, hits, named
from maelstream.jobs.recipe import HealthConfig, RecipeError
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.reading import classifier_from, classifier_values, read_weights
from maelstream.model.classifier import ClassifierConfig, Pool
from maelstream.model.neighbours import Neighbours, votes
from maelstream.model.patches import normalise
from maelstream.pipeline.eval_pass import Reading, every_image
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset

Encode = Callable[[UInt8[Tensor, "b 3 h w"]], Float32[Tensor, "b d"]]


@dataclass(frozen=True)
class Knn(Measuring):
    """Classify validation images by their nearest training images in the features of a frozen encoder."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """A run's folder, whose newest checkpoint is taken, or a file or folder of weights."""
    train: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRAIN")]
    """A packed dataset with labels."""
    val: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAL")]
    """Another, of the same classes."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """A neighbour's vote is exp(cosine / temperature)."""
    pool: Pool = "class_token"
    """Behind the final norm: the class token, or the mean of the patch tokens."""
    image_size: int | None = None
    """Pixels of a side; the pre-training's if not given."""


def features(
    encode: Encode, dataset: Dataset, reading: Reading, control_group: ControlGroup, bad: list[BadSample]
) -> Iterator[tuple[Float32[Tensor, "n d"], Tensor]]:
    """Features of length 1 of this rank's share, and the numbers of their samples; those in `bad` have none."""
    for portion in every_image(dataset, reading, control_group.ranks.rank, control_group.ranks.world_size, bad.append):
        counts = torch.from_numpy(portion.counts)
        found = F.normalize(encode(portion.images).float(), dim=1)[counts]  # (N, D)
        yield found, torch.from_numpy(portion.samples)[counts]


@torch.no_grad()
def neighbour_scores(
    encode: Encode,
    dim: int,
    train: Dataset,
    val: Dataset,
    reading: Reading,
    control_group: ControlGroup,
    k: int,
    temperature: float,
) -> tuple[Scores, tuple[str, ...]]:
    """The scores, and which training images could not be decoded; the same on every rank.

    Raises:
        MaelstreamError: fewer than `k` training images that can be decoded, or what `every_image` raises.
    """
    bad: list[BadSample] = []
    queries, known = torch.zeros(len(val), dim), torch.zeros(len(val), dtype=torch.int64)
    for found, numbers in features(encode, val, reading, control_group, bad):
        queries[numbers], known[numbers] = found.cpu(), 1
        device = found.device
    for tensor in (queries, known):  # each row is one rank's, and 0 on the others
        torch.distributed.all_reduce(tensor, group=control_group.group)
    undecodable = named(bad, control_group)
    neighbours, shown = Neighbours(queries.to(device), k), 0
    bad.clear()
    for found, numbers in features(encode, train, reading, control_group, bad):
        neighbours.show(found, numbers.to(device))
        shown += len(numbers)
    left_out = named(bad, control_group)
    if control_group.sums([float(shown)])[0] < k:
        raise AgreedError(f"{train.folder} has fewer than {k} images that can be decoded; give a smaller --k")
    keys = neighbours.keys.cpu()
    others = [torch.empty_like(keys) for _ in range(control_group.ranks.world_size)]
    torch.distributed.all_gather(others, keys, group=control_group.group)
    for rank, theirs in enumerate(others):
        if rank != control_group.ranks.rank:
            neighbours.merge(theirs.to(device))
    similarities, places = (tensor.cpu() for tensor in neighbours.found())
    labels = torch.from_numpy(train.label[places.numpy()]).long()
    ballot = votes(similarities, labels, len(train.classes), temperature)  # (V, classes)
    right = hits(ballot, torch.from_numpy(val.label.astype(np.int64))) & known[:, None].bool()
    top1, top5 = (100 * count / len(val) for count in right.sum(0).tolist())
    return Scores(top1, top5, len(val), undecodable), left_out


def encode_with(model: VisionTransformer, pool: Pool, mean: tuple[float, ...], std: tuple[float, ...]) -> Encode:
    """Features behind the final norm of a ViT that has one, for images as they were decoded."""
    device = model.cls_token.device

    def encode(images: Tensor) -> Tensor:
        tokens = model.forward_features(normalise(images.to(device), mean, std))  # (B, 1+L, D)
        return tokens[:, 0] if pool == "class_token" else tokens[:, 1:].mean(1)

    return encode


def main(args: list[str]) -> int:
    """`maelstream knn`; 0 when the result is written."""
    command = parsed(Knn, args, "knn")
    if command.k < 1 or command.temperature <= 0:
        raise RecipeError(f"--k {command.k} must be at least 1, --temperature {command.temperature} positive")
    train, val = Dataset.open(command.train), Dataset.open(command.val)
    check_datasets(train, val)
    if command.k > len(train):
        raise RecipeError(f"--k {command.k}: {train.folder} has {len(train)} images")
    weights = Path(command.weights)
    source = RunFolder(weights) if RunFolder(weights).config.exists() else None
    step = source.last_step() if source else None
    stored = read_weights(weights)
    values, mean, std = classifier_values(stored, command.heads, command.image_size)
    try:
        config = ClassifierConfig(**values, classes=1, pool="class_token", drop_path=0.0)
    except ValueError as error:
        raise RecipeError(f"{stored.file}: {error}; --heads and --image-size tell what the file does not") from None
    ranks = ranks_from_environment()
    reading = command.reading(config.image_size, None, ranks)
    model = classifier_from(stored, config).eval().requires_grad_(False)
    with process_group(ranks, 2 * HealthConfig().silent_s) as control_group:
        model.to(torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu"))
        encode = encode_with(model, command.pool, mean, std)
        found, left_out = neighbour_scores(
            encode, config.dim, train, val, reading, control_group, command.k, command.temperature
        )
    if ranks.rank:
        return 0
    for text in found.undecodable:
        print(f"maelstream knn: counted as wrong: {text}", file=sys.stderr)
    for text in left_out:
        print(f"maelstream knn: left out: {text}", file=sys.stderr)
    name = f"knn{command.k}-t{command.temperature:g}-{command.pool}-{val.folder.rstrip('/').rpartition('/')[2]}"
    settings = {
        "k": command.k,
        "temperature": command.temperature,
        "pool": command.pool,
        "margin": reading.margin,
        "image_size": list(config.image_size),
        "undecodable": [*found.undecodable, *left_out],
    }
    evaluation = Evaluation(
        job="knn",
        name=name,
        top1=found.top1,
        top5=found.top5,
        images=found.images,
        epochs=None,
        step=step,
        weights=command.weights,
        train=command.train,
        val=command.val,
        folder=str(command.result_folder(weights, step, name)),
        settings=settings,
        finished=time.time(),
    )
    record(evaluation, source.path if source else None)
    print(
        f"{evaluation.folder}: top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} % of {found.images:,} images by their "
        f"{command.k} nearest of {len(train):,}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run("knn", sys.argv[1:]))
