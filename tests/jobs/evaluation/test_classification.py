"""The loss of a batch on labels, what is drawn for it, and how often it is measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.evaluation import classification
from maelstream.jobs.evaluation.classification import Classification, model_of
from maelstream.jobs.evaluation.classify import check_datasets
from maelstream.jobs.recipe import ClassificationRecipe, EngineConfig, Job, LabelledData, OptimConfig, TuningConfig
from maelstream.model.config import ClassifierConfig, MAEConfig
from maelstream.model.mae import MAE
from maelstream.pipeline.erase import Erasing, erase
from maelstream.pipeline.mixup import MixupConfig
from maelstream.pipeline.producer import Batch
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError

PLAIN = MixupConfig(0, 0, 0)
MEAN, STD = torch.tensor(LabelledData().mean), torch.tensor(LabelledData().std)
BATCH = Batch(
    images=torch.arange(5 * 3 * 16).view(5, 3, 4, 4).to(torch.uint8),
    keys=torch.arange(5) * 7919,
    samples=np.arange(5),
    epochs=np.zeros(5, int),
    labels=np.array([0, 2, 1, 1, 0], np.int32),
    weight=1.0,
)


class Engine:
    """Logits from the mean colour, and a number of torch's own generator."""

    device = torch.device("cpu")

    def __init__(self, heads: tuple[int, ...] = ()):
        self.heads, self.drawn = heads, 0.0

    def gradient_accumulation_steps(self) -> int:
        return 2

    def __call__(self, images: Tensor) -> Tensor:
        self.logits = images.mean((2, 3)).expand(*self.heads, -1, -1)  # (*heads, B, 3)
        self.drawn = float(torch.rand(()))
        return self.logits


@pytest.fixture
def task(packed: Dataset) -> Callable[..., Classification]:
    def made(mixup: MixupConfig, rank: int = 0, **recipe: Any) -> Classification:
        model = ClassifierConfig(3, (8, 8), 4, dim=12, depth=1, heads=2)
        whole = ClassificationRecipe(model=model, mixup=mixup, engine=EngineConfig(precision="fp32"))
        return Classification(replace(whole, **recipe), packed, packed, Ranks(rank, 2, rank, 2))

    return made


def test_without_mixing_and_smoothing_the_loss_is_plain_cross_entropy(task: Callable[..., Classification]) -> None:
    engine, labels = Engine(), torch.from_numpy(BATCH.labels).long()
    loss = task(PLAIN).loss(engine, 3, BATCH.images, BATCH, 0)
    assert torch.equal(loss, F.cross_entropy(engine.logits, labels))
    loss = task(replace(PLAIN, label_smoothing=0.1)).loss(engine, 3, BATCH.images, BATCH, 0)
    assert torch.equal(loss, F.cross_entropy(engine.logits, labels, label_smoothing=0.1))


def test_the_loss_of_several_heads_is_their_sum(task: Callable[..., Classification]) -> None:
    one, three = (task(PLAIN).loss(Engine(heads), 0, BATCH.images, BATCH, 0) for heads in ((), (3,)))
    torch.testing.assert_close(three, 3 * one)


def test_mixing_is_the_same_whenever_the_batch_comes(task: Callable[..., Classification]) -> None:
    losses = [task(MixupConfig()).loss(Engine(), step, BATCH.images, BATCH, 0) for step in (2, 2, 9)]
    plain = task(PLAIN).loss(Engine(), 2, BATCH.images, BATCH, 0)
    assert losses[0] == losses[1] == losses[2] != plain  # the keys are those of the samples


def test_what_the_model_draws_depends_on_step_rank_and_micro_batch_alone(task: Callable[..., Classification]) -> None:
    def drawn(step: int, rank: int, number: int) -> float:
        engine = Engine()
        task(PLAIN, rank).loss(engine, step, BATCH.images, BATCH, number)
        return engine.drawn

    places = [(step, rank, number) for step in range(3) for rank in range(2) for number in range(2)]
    first = [drawn(*place) for place in places]
    torch.rand(7)
    assert [drawn(*place) for place in places] == first and len(set(first)) == len(places)


@pytest.mark.parametrize(("every", "due"), [(0, [12]), (1, [5, 10, 12]), (2, [10, 12])])
def test_measuring_comes_at_the_end_of_epochs_and_of_the_run(
    task: Callable[..., Classification], every: int, due: list[int]
) -> None:
    """60 samples in batches of 12: 5 steps an epoch."""
    optim, tuning = OptimConfig(12, epochs=2.4, warmup_epochs=0), TuningConfig(evaluate_every_epochs=every)
    found = task(PLAIN, optim=optim, tuning=tuning)
    assert [step for step in range(1, 13) if found.evaluator.is_due(step, 12)] == due


def test_an_empty_validation_set_is_rejected(packed: Dataset) -> None:
    """`pack` writes none; a manifest that is made by hand may be of one."""
    no_rows = {"shard": replace(packed.shard, length=0)}
    empty = Dataset(packed.storage, packed.manifest, packed.fingerprint, no_rows, {})
    assert len(empty) == 0
    with pytest.raises(MaelstreamError, match="holds no images; pack some"):
        check_datasets(packed, empty)


def test_a_box_is_erased_after_normalising_and_before_mixup(
    task: Callable[..., Classification], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the reference: normal noise, not limited to the levels of a byte, which mixup then mixes."""
    boxes = np.array([[0, 0, 4, 4], *[[0, 0, 0, 0]] * 3, [1, 0, 2, 3]], np.int32)
    erasing, seen = Erasing(boxes, np.arange(5)), list[Tensor]()
    batch = replace(BATCH, erasing=erasing)

    def mixed(levels: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        seen.append(levels.clone())
        return levels, labels

    monkeypatch.setattr(classification, "apply_mixup", mixed)
    task(MixupConfig()).loss(Engine(), 0, batch.images, batch, 0)
    expected = (batch.images.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    erase(expected, erasing, (), ())
    torch.testing.assert_close(seen[0], expected)
    assert float(seen[0].min()) < -2.2  # black is -2.12


@pytest.mark.parametrize(("job", "std"), [("scratch", 0.02), ("finetune", 2e-5)])
def test_the_head_starts_at_timms_deviation_from_scratch_and_at_the_references_on_weights(
    tmp_path: Path, job: Job, std: float
) -> None:
    """Reference: timm's 0.02, and 2e-5 only when weights are loaded."""
    file = ""
    if job == "finetune":
        file = str(tmp_path / "encoder.pth")
        mae = MAE(MAEConfig((16, 16), 4, dim=48, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2))
        torch.save({"model": mae.state_dict()}, file)
    model = ClassifierConfig(100, (16, 16), 4, dim=48, depth=1, heads=2)
    built: Any = model_of(ClassificationRecipe(job=job, model=model, weights=file), None)
    assert built.head.weight.std().item() == pytest.approx(std, rel=0.1)
    assert built.blocks[0].attn.qkv.weight.std().item() > 0.01 and not built.head.bias.any()
