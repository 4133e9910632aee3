"""The keys of a recipe with their defaults: frozen dataclasses that check their values when they are made.

`Recipe` describes a pre-training run and `ClassificationRecipe` a run that is trained on labels. Import them from
`jobs/recipe.py`. This module and what it imports need neither torch nor DALI, so that reading a recipe is cheap.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from maelstream.model.config import ClassifierConfig, MAEConfig
from maelstream.pipeline.config import CropConfig, LoaderConfig, MixupConfig, Shuffle


@dataclass(frozen=True)
class StreamConfig:
    """WebDataset shards that are read sequentially instead of through an index; see docs/pipeline.md for the limits."""

    urls: str = ""
    """`https://host/train-{0000..1023}.tar`, `pipe:...` or a path; empty: no stream."""
    samples: int = 0
    """Number of samples in all shards together: the length of an epoch."""
    shuffle_buffer: int = 1000
    """Samples in the buffer from which each rank draws the next one at random."""


@dataclass(frozen=True)
class DataConfig:
    """The images of pre-training, and how they are shuffled and cropped."""

    dataset: str = "data/imagenet-train"
    """Folder or URI that `maelstream pack` wrote."""
    mix: dict[str, float] = field(default_factory=dict)
    """Several datasets with a weight for each; replaces `dataset`."""
    stream: StreamConfig = StreamConfig()
    """Shards without an index; replaces `dataset` and `mix`."""
    crop: CropConfig = CropConfig()
    shuffle: Shuffle = "global"
    """global: any sample may come at any position of an epoch. block: blocks of consecutive samples are shuffled, then
    the samples in each 16 of these blocks, which gives long reads for slow disks and object stores. none: packed
    order."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a half-cycle cosine schedule (paper, table 8)."""

    batch_size: int = 4096
    """Effective batch size: samples per step over all ranks and micro-batches."""
    base_lr: float = 1.5e-4
    """Peak lr for 256 samples per step; the peak lr is base_lr x batch_size / 256."""
    min_lr: float = 0.0
    """lr at the end of the cosine."""
    weight_decay: float = 0.05
    """AdamW's decay of weight matrices; biases, norms and tokens have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    clip_grad: float = 0.0
    """Gradients with a larger norm are scaled down to this norm; 0: no clipping, as in the paper."""
    warmup_epochs: float = 40.0
    """Epochs in which the lr rises linearly from 0."""
    epochs: float = 800.0
    """Length of the schedule, with the warm-up; may be a fraction."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is not positive")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is not in 0..epochs ({self.epochs})")
        if self.clip_grad < 0:
            raise ValueError(f"clip_grad {self.clip_grad} is negative; 0 switches clipping off")


@dataclass(frozen=True)
class EngineConfig:
    """How the training step uses the hardware: precision, micro-batches, ZeRO and memory savings."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps float32 master weights, moments and gradient sums."""
    micro_batch_size: int = 64
    """Largest number of samples that a rank runs through the model at once; it sets the gradient accumulation."""
    zero: Literal[1, 2, 3] = 1
    """What is partitioned over the ranks: the optimizer's state (1), gradients too (2), weights too (3: least memory,
    most traffic). A run can resume at another stage."""
    offload_optimizer: bool = False
    """Keep master weights and moments in the host's memory, for models whose state does not fit on the GPU."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: less memory, a third more arithmetic."""
    compile: bool = False
    """`torch.compile` of the forward and backward pass; not at stage 3."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must be at least 1")
        if self.compile and self.zero == 3:
            raise ValueError(
                "compile does not work with zero 3, which moves weights while the model runs; use zero 1 or 2"
            )


@dataclass(frozen=True)
class LogConfig:
    """What a run logs, how often, and to which trackers."""

    every_steps: int = 20
    """Steps per line of metrics.jsonl and of the terminal."""
    reconstruct_every_epochs: float = 20.0
    """Write reconstructions to RUN/reconstructions/ at the first checkpoint of every period of this many epochs, and at
    the last checkpoint; 0: never."""
    peak_tflops: float = 0.0
    """The accelerator's dense peak at this precision, for MFU; 0: from the data sheet of the GPU if it is known,
    otherwise MFU is not logged."""
    wandb: bool = False
    """Log to Weights & Biases as well: `pip install maelstream[wandb]`; offline if WANDB_MODE says so."""
    mlflow: bool = False
    """Log to MLflow as well: `pip install maelstream[mlflow]`; MLFLOW_TRACKING_URI names the server."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps {self.every_steps} must be at least 1")
        if self.reconstruct_every_epochs < 0:
            raise ValueError(f"reconstruct_every_epochs {self.reconstruct_every_epochs} is negative; 0 means never")
        if self.peak_tflops < 0:
            raise ValueError(f"peak_tflops {self.peak_tflops} is negative")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often checkpoints are written, and which ones are kept."""

    every_steps: int = 1000
    """Steps from one checkpoint to the next; the last step always has one."""
    keep: int = 3
    """Number of newest checkpoints that are kept."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this step are kept forever; 0: none."""

    def __post_init__(self) -> None:
        if min(self.every_steps, self.keep) < 1 or self.keep_every_steps < 0:
            raise ValueError(
                f"every_steps {self.every_steps} and keep {self.keep} must be at least 1, keep_every_steps "
                f"{self.keep_every_steps} at least 0"
            )


@dataclass(frozen=True)
class HealthConfig:
    """When a run counts as unhealthy, and how long its ranks wait for one another."""

    bad_steps: int = 10
    """The run stops after this many steps in a row that all ranks skipped because of NaN or Inf."""
    spike: float = 2.0
    """A loss above this multiple of the median of the last 50 steps is flagged in the metrics."""
    silent_s: float = 600.0
    """Seconds that ranks wait for a rank that makes no progress; then they report its number and the run ends."""
    grace_s: float = 120.0
    """Most seconds from a signal (SIGTERM, SIGUSR1, Ctrl-C, SIGHUP, SIGXCPU) to the exit; the current step is finished
    and saved in this time."""

    def __post_init__(self) -> None:
        if self.bad_steps < 1 or self.spike <= 1 or min(self.silent_s, self.grace_s) <= 0:
            raise ValueError(
                f"bad_steps {self.bad_steps} must be at least 1, spike {self.spike} above 1, silent_s {self.silent_s} "
                f"and grace_s {self.grace_s} positive"
            )


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a pre-training run."""

    job: ClassVar[str] = "pretrain"
    model: MAEConfig = MAEConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    seed: int = 0
    """Seed of the initial weights, the order of samples, the crops and the masks."""
    target_file: str = ""
    """File of `maelstream fit-pca` or `fit-tokenizer` that the targets "pca" and "token" need. A run keeps its own copy
    forever; runs are compared by the content of the file, not by its path."""
    init: str = ""
    """Weights to start from instead of random ones: a run, a file or a folder, with or without a decoder. The run keeps
    its own copy."""
    init_sha256: str = ""
    """SHA-256 of the file of `init`; the run writes it."""
    engine: EngineConfig = EngineConfig()
    loader: LoaderConfig = LoaderConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = HealthConfig()


Job = Literal["finetune", "linprobe", "partial", "scratch"]


@dataclass(frozen=True)
class LabelledData:
    """The labelled images for training and validation of a classifier."""

    train: Annotated[str, tyro.conf.Suppress] = ""
    """Folder or URI of a packed dataset with labels."""
    val: Annotated[str, tyro.conf.Suppress] = ""
    """Folder or URI of a packed dataset with the same classes."""
    crop: CropConfig = CropConfig(scale=(0.08, 1.0), rand_augment=9.0, erase=0.25)
    """Crops for training; validation uses the centre crop."""
    shuffle: Shuffle = "global"
    """Order of the training samples: global, block or none, as in pre-training."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from pixels scaled to 0..1, as in pre-training."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides pixels after the mean is subtracted, as in pre-training."""


@dataclass(frozen=True)
class TuningConfig:
    """Which parameters are trained, and with which optimizer."""

    optimizer: Literal["adamw", "lars"] = "adamw"
    """adamw for fine-tuning, lars for linear probes (paper, tables 9 and 10)."""
    momentum: float = 0.9
    """Momentum of LARS; AdamW uses `optim.betas`."""
    layer_decay: float = 1.0
    """lr of a layer divided by the lr of the layer above it."""
    blocks: Annotated[float, tyro.conf.arg(aliases=["--blocks"])] = -1.0
    """Number of last blocks that are trained: 0.5 is the MLP of the last block, 0 the head only, -1 everything."""
    probe: bool = False
    """Train only a linear layer on the frozen encoder's features, after a BatchNorm."""
    lrs: tuple[float, ...] = ()
    """One linear probe per base lr, trained on the same features; empty: one probe with `optim.base_lr`."""
    ema: float = 0.0
    """Decay per step of the weights' exponential moving average, which is evaluated too; 0: no EMA."""
    evaluate_every_epochs: int = 1
    """0: only at the end."""

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1 or not 0 <= self.ema < 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"layer_decay {self.layer_decay} must be in 0..1 and not 0, ema {self.ema} and momentum "
                f"{self.momentum} in 0..1 without 1"
            )
        if self.blocks != -1 and self.blocks != 0.5 and (self.blocks < 0 or self.blocks % 1):
            raise ValueError(f"blocks {self.blocks} is neither 0, 0.5, a whole number nor -1 for everything")
        if self.lrs and (not self.probe or min(self.lrs) <= 0 or len(set(self.lrs)) < len(self.lrs)):
            raise ValueError(f"lrs {self.lrs} must be positive, all different, and only for linear probes")
        if self.evaluate_every_epochs < 0:
            raise ValueError(f"evaluate_every_epochs {self.evaluate_every_epochs} is negative; 0 means only at the end")


@dataclass(frozen=True)
class ClassificationRecipe:
    """Everything that defines a run that is trained on labels."""

    job: Annotated[Job, tyro.conf.Suppress] = "finetune"
    weights: Annotated[str, tyro.conf.Suppress] = ""
    """Initial weights of the encoder: a run's folder or a file; empty: random initialisation."""
    weights_step: Annotated[int | None, tyro.conf.Suppress] = None
    """Step of pre-training at which the weights were saved, if `weights` is a run."""
    model: ClassifierConfig = ClassifierConfig()
    data: LabelledData = LabelledData()
    optim: OptimConfig = OptimConfig(1024, 5e-4, betas=(0.9, 0.999), warmup_epochs=5, epochs=100)
    tuning: TuningConfig = TuningConfig(layer_decay=0.65)
    mixup: MixupConfig = MixupConfig()
    seed: int = 0
    """Seed of the initial weights of the head, the order of samples, the crops and mixup."""
    engine: EngineConfig = EngineConfig()
    loader: LoaderConfig = LoaderConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = HealthConfig()


AnyRecipe = Recipe | ClassificationRecipe
