"""Recipes: one YAML file an experiment, laid over its `base:`, resolved into frozen dataclasses.

`engine`, `loader`, `log`, `checkpoint` and `health` say how a run is carried out and may differ from one start to the
next; all else is the experiment, which a run keeps for life. `Recipe` is that of pre-training, `ClassificationRecipe`
that of everything which is trained on labels.
"""

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from maelstream.model.config import ClassifierConfig, MAEConfig
from maelstream.pipeline.augment_params import CropConfig
from maelstream.pipeline.decode import DecodeConfig
from maelstream.pipeline.mixup import MixupConfig
from maelstream.pipeline.order import Shuffle
from maelstream.pipeline.stream import Stream
from maelstream.shards.errors import MaelstreamError

RECIPES = Path(__file__).parents[1] / "recipes"
"""The recipes that ship with the project, in a checkout and in a wheel."""


class RecipeError(MaelstreamError):
    """A recipe that cannot be read or makes no sense."""


@dataclass(frozen=True)
class StreamConfig:
    """WebDataset shards that are read through instead of indexed: weaker promises, see docs/pipeline.md."""

    urls: str = ""
    """`https://host/train-{0000..1023}.tar`, `pipe:...`, a path; none if empty."""
    samples: int = 0
    """How many the shards hold, all together: the length of an epoch."""
    shuffle_buffer: int = 1000
    """Samples that a rank holds and draws the next from."""

    def opened(self) -> Stream:
        """MaelstreamError as `Stream`."""
        return Stream(self.urls, self.samples, self.shuffle_buffer)


@dataclass(frozen=True)
class DataConfig:
    dataset: str = "data/imagenet-train"
    """Folder or URI that `maelstream pack` wrote."""
    mix: dict[str, float] = field(default_factory=dict)
    """Several of them instead, each with its weight."""
    stream: StreamConfig = StreamConfig()
    """Or shards that cannot be read at random."""
    crop: CropConfig = CropConfig()
    shuffle: Shuffle = "global"
    """Any sample may come at any place of an epoch; or blocks of consecutive samples, then samples in windows of 16
    blocks ("block": long reads, for slow disks and stores); or the order in which they were packed ("none")."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up, half a cosine (paper, table 8)."""

    batch_size: int = 4096
    """Effective batch: samples a step over all ranks and micro-batches."""
    base_lr: float = 1.5e-4
    """Peak lr for 256 samples a step; the peak lr is base_lr x batch_size / 256."""
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 0.0
    """Longest gradient that is applied as it is; 0: every one, as in the paper."""
    warmup_epochs: float = 40.0
    epochs: float = 800.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is not positive")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is not in 0..epochs ({self.epochs})")
        if self.clip_grad < 0:
            raise ValueError(f"clip_grad {self.clip_grad} is negative; 0 switches clipping off")


@dataclass(frozen=True)
class EngineConfig:
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps float32 master weights, moments and gradient sums."""
    micro_batch_size: int = 64
    """Most samples a rank puts through the model at once; gradient accumulation follows from it."""
    zero: Literal[1, 2, 3] = 1
    """What ranks share out: the optimizer's state (1), gradients too (2), weights too (3: least memory, most traffic).
    A run may go on at another stage."""
    offload_optimizer: bool = False
    """Keep master weights and moments in the host's memory; for models whose state does not fit the GPU."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass: less memory, a third more arithmetic."""
    compile: bool = False
    """`torch.compile` of the forward and backward pass; not at stage 3."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must be at least 1")
        if self.compile and self.zero == 3:
            raise ValueError(
                "compile does not go with zero 3, which moves weights while the model runs; take zero 1 or 2"
            )


@dataclass(frozen=True)
class LoaderConfig:
    threads: int = 0
    """Threads that decode in each rank; 0: the machine's cores shared by its ranks."""
    prefetch: int = 4
    """Micro-batches read, and as many decoded, ahead of the step."""
    decode: DecodeConfig = DecodeConfig()
    max_bad_share: float = 0.001
    """Share of the dataset's samples that may turn out bad and be replaced before the run is stopped."""

    def __post_init__(self) -> None:
        if self.threads < 0 or self.prefetch < 1:
            raise ValueError(f"threads {self.threads} must be at least 0, prefetch {self.prefetch} at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share {self.max_bad_share} is not in 0..1")


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 20
    reconstruct_every_epochs: float = 20.0
    """Pictures of the first checkpoint in every so many epochs, and of the last, in RUN/reconstructions/; 0: none."""
    peak_tflops: float = 0.0
    """The accelerator's dense peak at this precision, for MFU; 0: known from its name, or MFU is left out."""
    wandb: bool = False
    """Weights & Biases too: `pip install maelstream[wandb]`; offline where WANDB_MODE says so."""
    mlflow: bool = False
    """MLflow too: `pip install maelstream[mlflow]`; its MLFLOW_TRACKING_URI says where to."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps {self.every_steps} must be at least 1")
        if self.reconstruct_every_epochs < 0:
            raise ValueError(f"reconstruct_every_epochs {self.reconstruct_every_epochs} is negative; 0 is never")
        if self.peak_tflops < 0:
            raise ValueError(f"peak_tflops {self.peak_tflops} is negative")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 3
    """How many of the newest checkpoints stay."""
    keep_every_steps: int = 0
    """Those of every so many steps stay for good; 0: none."""

    def __post_init__(self) -> None:
        if min(self.every_steps, self.keep) < 1 or self.keep_every_steps < 0:
            raise ValueError(
                f"every_steps {self.every_steps} and keep {self.keep} must be at least 1, keep_every_steps "
                f"{self.keep_every_steps} at least 0"
            )


@dataclass(frozen=True)
class HealthConfig:
    """When a run is taken for ill, and what for."""

    bad_steps: int = 10
    """Steps in a row that NaN or Inf made all ranks skip, after which the run stops."""
    spike: float = 2.0
    """A loss so many times the median of the last 50 steps is flagged in the metrics."""
    silent_s: float = 600.0
    """How long ranks wait for one that does not come; then they name it, and the run ends."""
    grace_s: float = 120.0
    """Most time from SIGTERM, SIGUSR1 or Ctrl-C to the exit: the step is finished and saved in it."""

    def __post_init__(self) -> None:
        if self.bad_steps < 1 or self.spike <= 1 or min(self.silent_s, self.grace_s) <= 0:
            raise ValueError(f"bad_steps must be at least 1, spike above 1, silent_s and grace_s positive: {self}")


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a pre-training run."""

    model: MAEConfig = MAEConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    seed: int = 0
    target_file: str = ""
    """What the targets "pca" and "token" compare with: a file of `maelstream fit-pca` or `fit-tokenizer`. A run keeps a
    copy for life; the content counts, not the path."""
    engine: EngineConfig = EngineConfig()
    loader: LoaderConfig = LoaderConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = HealthConfig()


Job = Literal["finetune", "linprobe", "partial", "scratch"]


@dataclass(frozen=True)
class LabelledData:
    """What a classifier is trained and measured on."""

    train: Annotated[str, tyro.conf.Suppress] = ""
    """Folder or URI of a packed dataset with labels."""
    val: Annotated[str, tyro.conf.Suppress] = ""
    """Another, of the same classes."""
    crop: CropConfig = CropConfig(scale=(0.08, 1.0), rand_augment=9.0, erase=0.25)
    """Of training; validation takes the centre."""
    shuffle: Shuffle = "global"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """What is subtracted from pixels scaled to 0..1, as in pre-training."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TuningConfig:
    """Which parameters are trained, and by what."""

    optimizer: Literal["adamw", "lars"] = "adamw"
    momentum: float = 0.9
    """Of LARS; AdamW has `optim.betas`."""
    layer_decay: float = 1.0
    """The lr of a layer over that of the layer above it."""
    blocks: float = -1.0
    """How many of the last blocks are trained: 0.5 is the MLP of the last, 0 the head alone, -1 everything."""
    probe: bool = False
    """Train nothing but a linear layer behind a BatchNorm of the frozen encoder's features."""
    lrs: tuple[float, ...] = ()
    """Base lrs of as many probes, side by side on the same features; one with `optim.base_lr` if empty."""
    ema: float = 0.0
    """Decay a step of the mean of the weights that is measured beside them; 0: no mean."""
    evaluate_every_epochs: int = 1
    """0: at the end alone."""

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1 or not 0 <= self.ema < 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"layer_decay {self.layer_decay} must be in 0..1 and not 0, ema {self.ema} and momentum "
                f"{self.momentum} in 0..1 without 1"
            )
        if self.blocks != -1 and self.blocks != 0.5 and (self.blocks < 0 or self.blocks % 1):
            raise ValueError(f"blocks {self.blocks} is neither 0, 0.5, a whole number nor -1 for everything")
        if self.lrs and (not self.probe or min(self.lrs) <= 0 or len(set(self.lrs)) < len(self.lrs)):
            raise ValueError(f"lrs {self.lrs} are of linear probes, positive, and each given once")
        if self.evaluate_every_epochs < 0:
            raise ValueError(f"evaluate_every_epochs {self.evaluate_every_epochs} is negative; 0 is at the end alone")


@dataclass(frozen=True)
class ClassificationRecipe:
    """Everything that defines a run which is trained on labels."""

    job: Annotated[Job, tyro.conf.Suppress] = "finetune"
    weights: Annotated[str, tyro.conf.Suppress] = ""
    """What the encoder starts from: a run's folder or a file; "" for a fresh one."""
    weights_step: Annotated[int | None, tyro.conf.Suppress] = None
    """Of pre-training, where `weights` is a run."""
    model: ClassifierConfig = ClassifierConfig()
    data: LabelledData = LabelledData()
    optim: OptimConfig = OptimConfig(1024, 5e-4, betas=(0.9, 0.999), warmup_epochs=5, epochs=100)
    tuning: TuningConfig = TuningConfig(layer_decay=0.65)
    mixup: MixupConfig = MixupConfig()
    seed: int = 0
    engine: EngineConfig = EngineConfig()
    loader: LoaderConfig = LoaderConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = HealthConfig()


EXPERIMENT = ("model", "data", "optim", "seed")
_NO_EXPERIMENT = ("target_file", "weights_step", "engine", "loader", "log", "checkpoint", "health")
AnyRecipe = Recipe | ClassificationRecipe
R = TypeVar("R", Recipe, ClassificationRecipe)


def load_recipe(path: Path) -> Recipe:
    """The recipe of `path`; RecipeError for a missing file, a circle of bases, an unknown key or a wrong value."""
    return resolve(read_values(path), str(path))


def load_any_recipe(path: Path) -> AnyRecipe:
    """As `load_recipe`, of pre-training or of a `job` on labels."""
    values = read_values(path)
    if "job" in values:
        return resolve_as(ClassificationRecipe, values, str(path))
    return resolve_as(Recipe, values, str(path))


def resolve(values: dict[str, Any], where: str) -> Recipe:
    """A recipe from nested plain values; `where` names them in errors."""
    return resolve_as(Recipe, values, where)


def resolve_as(schema: type[R], values: dict[str, Any], where: str) -> R:
    """As `resolve`, of the kind that is asked for."""
    _check_keys(values, schema, where, "")
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{where}: {name}: {first['msg']} (found {first['input']!r})") from None


def read_values(path: Path) -> dict[str, Any]:
    """The nested values of a file over those of its bases, unchecked; RecipeError as `load_recipe`."""
    return _merged(path, ())


def dump_recipe(recipe: AnyRecipe) -> str:
    """YAML of every key; `load_recipe` gives the same recipe back."""
    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False)


def differing_keys(old: AnyRecipe, new: AnyRecipe) -> dict[str, tuple[Any, Any]]:
    """The experiment's keys, dotted, in which two recipes differ, with the values of both."""
    old_values, new_values = (
        flat_values({name: value for name, value in asdict(recipe).items() if name not in _NO_EXPERIMENT})
        for recipe in (old, new)
    )
    names = [*new_values, *(name for name in old_values if name not in new_values)]
    pairs = {name: (old_values.get(name), new_values.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def may_change(name: str) -> bool:
    """Whether a run can go on with another value of this key, if its user says so.

    The schedule can change, and where the dataset lies: a checkpoint knows what the dataset holds. Weights of another
    shape, another line of samples or another batch cannot.
    """
    paths = ("data.dataset", "data.train", "data.val", "weights")
    return name in (*paths, "tuning.evaluate_every_epochs") or (
        name.startswith("optim.") and name != "optim.batch_size"
    )


def _merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The file's values over those of its base."""
    if path.resolve() in above:
        raise RecipeError(f"{path}: its chain of `base:` leads back to itself")
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        near = difflib.get_close_matches(path.stem, known, 1)
        hint = f"; did you mean {path.with_name(near[0] + '.yaml')}?" if near else ""
        raise RecipeError(f"recipe {path} cannot be read ({getattr(error, 'strerror', None) or error}){hint}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    if (base := values.pop("base", None)) is None:
        return values
    return laid_over(_merged(path.parent / base, (*above, path.resolve())), values)


def laid_over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` over `base`, key by key."""
    both_dicts = {k for k in values.keys() & base.keys() if isinstance(values[k], dict) and isinstance(base[k], dict)}
    return base | values | {key: laid_over(base[key], values[key]) for key in both_dicts}


def _check_keys(values: dict[str, Any], schema: type, where: str, prefix: str) -> None:
    hints = get_type_hints(schema)
    names = [item.name for item in fields(schema)]
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, cutoff=0.0)[0]
            raise RecipeError(f"{where}: unknown key {prefix}{key}; the nearest is {prefix}{near}")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise RecipeError(f"{where}: {prefix}{key} holds keys of its own, not {value!r}")
            _check_keys(value, hints[key], where, f"{prefix}{key}.")


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML writes without a tag."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def flat_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_values(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
