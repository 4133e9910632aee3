"""k-nearest-neighbour evaluation of frozen features; the body of `maelstream knn`.

Every rank holds the features of all validation images and encodes its share of the training images. For each validation
image it keeps the k nearest training images that it has met; then the ranks merge their results. Memory per rank does
not grow with the training set: 4 bytes per number of the validation features (50,000 images of ViT-L: 205 MB, twice on
a machine with a GPU), 8 bytes per neighbour, and about 20 bytes per pair of 8,192 validation images and a micro-batch.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from maelstream.jobs.distributed.errors import AgreedError
from maelstream.jobs.distributed.ranks import ControlGroup, process_group, ranks_from_environment
from maelstream.jobs.evaluation.classify import check_datasets
from maelstream.jobs.evaluation.options import KnnOptions
from maelstream.jobs.evaluation.results import Scores, record_scores
from maelstream.jobs.evaluation.scores import gather_undecodable, hits
from maelstream.jobs.hardware import process_device
from maelstream.jobs.recipe import HealthConfig, RecipeError
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.weights.reading import classifier_from_encoder, classifier_values, read_weights
from maelstream.model.config import ClassifierConfig, Pool
from maelstream.model.neighbours import Neighbours, votes
from maelstream.model.patches import normalise
from maelstream.pipeline.eval_pass import Reading, every_image
from maelstream.pipeline.sample_source import BadSample
from maelstream.shards.dataset import Dataset

Encode = Callable[[UInt8[Tensor, "b 3 h w"]], Float32[Tensor, "b d"]]


def evaluate_neighbours(weights: str, train_set: Dataset, val_set: Dataset, options: KnnOptions) -> None:
    """Evaluates the encoder `weights` on all ranks; rank 0 records and prints the result.

    Raises:
        MaelstreamError: weights that cannot be read, datasets that do not fit, or fewer than `k` training images.
    """
    check_datasets(train_set, val_set)
    options.check_count(train_set)
    path = Path(weights)
    run = path if RunFolder(path).config.exists() else None
    step = RunFolder(run).last_step() if run else None
    stored = read_weights(path)
    values, mean, std = classifier_values(stored, options.heads, options.image_size)
    try:
        config = ClassifierConfig(**values, classes=1, pool="class_token", drop_path=0.0)
    except ValueError as error:
        raise RecipeError(f"{stored.file}: {error}; give --heads and --image-size, which the file lacks") from None
    ranks = ranks_from_environment()
    reading = options.reading(config.image_size, None, ranks)
    model = classifier_from_encoder(stored, config).eval().requires_grad_(False)
    name = f"knn{options.k}-t{options.temperature:g}-{options.pool}-{val_set.folder.rstrip('/').rpartition('/')[2]}"
    folder = options.result_folder(path, step, name)
    with process_group(ranks, 2 * HealthConfig().silent_s) as control_group:
        model.to(process_device(ranks.local_rank))
        encode = encode_with(model, options.pool, mean, std)
        found, left_out = neighbour_scores(
            encode, config.dim, train_set, val_set, reading, control_group, options.k, options.temperature
        )
    if ranks.rank:
        return
    evaluation = record_scores(
        found,
        run,
        job="knn",
        name=name,
        weights=weights,
        train=train_set.folder,
        val=val_set.folder,
        folder=folder,
        settings={
            "k": options.k,
            "temperature": options.temperature,
            "pool": options.pool,
            "margin": reading.crop.margin,
            "image_size": list(config.image_size),
        },
        step=step,
        left_out=left_out,
    )
    print(
        f"{evaluation.folder}: top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} % of {found.images:,} images by their "
        f"{options.k} nearest of {len(train_set):,}"
    )


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
    """The scores, and a text per training image that could not be decoded; the same on every rank.

    Raises:
        MaelstreamError: fewer than `k` training images that can be decoded, or what `every_image` raises.
    """
    bad: list[BadSample] = []
    queries, decoded = torch.zeros(len(val), dim), torch.zeros(len(val), dtype=torch.int64)
    for found, samples in features(encode, val, reading, control_group, bad):
        queries[samples], decoded[samples] = found.cpu(), 1
        device = found.device
    for tensor in (queries, decoded):  # exactly one rank fills each row; it is 0 on the others
        torch.distributed.all_reduce(tensor, group=control_group.group)
    undecodable = gather_undecodable(bad, control_group)
    neighbours, shown = Neighbours(queries.to(device), k), 0
    bad.clear()
    for found, samples in features(encode, train, reading, control_group, bad):
        neighbours.add(found, samples.to(device))
        shown += len(samples)
    left_out = gather_undecodable(bad, control_group)
    if control_group.sums([float(shown)])[0] < k:
        raise AgreedError(f"{train.folder} has fewer than {k} images that can be decoded; give a smaller --k")
    keys = neighbours.keys.cpu()
    keys_by_rank = [torch.empty_like(keys) for _ in range(control_group.ranks.world_size)]
    torch.distributed.all_gather(keys_by_rank, keys, group=control_group.group)
    for rank, other_keys in enumerate(keys_by_rank):
        if rank != control_group.ranks.rank:
            neighbours.merge(other_keys.to(device))
    similarities, samples = (tensor.cpu() for tensor in neighbours.nearest())
    labels = torch.from_numpy(train.label[samples.numpy()]).long()
    class_votes = votes(similarities, labels, len(train.classes), temperature)  # (V, classes)
    correct = hits(class_votes, torch.from_numpy(val.label[:].astype(np.int64))) & decoded[:, None].bool()
    top1, top5 = (100 * count / len(val) for count in correct.sum(0).tolist())
    return Scores(top1, top5, len(val), undecodable), left_out


def features(
    encode: Encode, dataset: Dataset, reading: Reading, control_group: ControlGroup, bad: list[BadSample]
) -> Iterator[tuple[Float32[Tensor, "n d"], Int64[Tensor, "n"]]]:
    """Features of length 1 of this rank's share, and their samples; images that cannot be decoded go to `bad`."""
    for portion in every_image(dataset, reading, control_group.ranks.rank, control_group.ranks.world_size, bad.append):
        counts = torch.from_numpy(portion.counted)
        found = F.normalize(encode(portion.images).float(), dim=1)[counts]  # (N, D)
        yield found, torch.from_numpy(portion.samples)[counts]


def encode_with(model: VisionTransformer, pool: Pool, mean: tuple[float, ...], std: tuple[float, ...]) -> Encode:
    """A function from decoded images to pooled features after the final norm of `model`, which must have one."""
    device = model.cls_token.device

    def encode(images: Tensor) -> Tensor:
        tokens = model.forward_features(normalise(images.to(device), mean, std))  # (B, 1+L, D)
        return tokens[:, 0] if pool == "class_token" else tokens[:, 1:].mean(1)

    return encode
