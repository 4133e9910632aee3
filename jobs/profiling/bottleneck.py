"""Finds the stage that limits a run, by which factor, and the setting most likely to help, from figures alone.

Reading, decoding and the training step overlap, so the slowest of them sets the pace. Stages that run one after the
other share their time: copy, step, optimizer and exchange on the device; decoding and resizing where the same cores do
both.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from maelstream.pipeline.config import STAGES

DATA, TRAINING = STAGES[:4], STAGES[4:]
_STORAGE_BOUND = 0.8  # reading at this share of the storage's rate, or more, is limited by the storage
_COMPUTE_BOUND_MFU = 0.4  # from this MFU up, the arithmetic itself is the limit
_CONTENDED = 0.8  # a run below this share of the slowest stage's rate is slowed down by something else as well


@dataclass(frozen=True)
class RunSetup:
    """The machine and the recipe's settings, as far as the advice depends on them."""

    on_gpu: bool
    """Whether the model is on a GPU."""
    decodes_on_gpu: bool
    threads: int
    cores: int
    """Cores that this rank may use."""
    world_size: int
    local: bool
    """Whether the shards are on a local disk."""
    shuffle: str
    dct_scaling: bool
    hw_decoder_load: float
    prefetch: int
    micro_batch_size: int
    batch_size: int
    precision: str
    zero: int
    compile: bool
    activation_checkpointing: bool
    offload_optimizer: bool


class Advice(NamedTuple):
    """One setting of a recipe, the value to try and the reason."""

    setting: str
    value: str
    why: str


class Bottleneck(NamedTuple):
    """The stage that limits the run; the fields are keys of the profile's JSON."""

    limit: str
    """The stage that would limit the run even if all others took no time."""
    factor: float
    """How many times faster the run could go if that stage cost nothing: the next slowest rate over this one."""
    advice: Advice
    words: str


def find_bottleneck(rates: dict[str, float], mfu: float | None, run_rate: float | None, setup: RunSetup) -> Bottleneck:
    """The slowest part of a run.

    Args:
        rates: Images/s of the stages that were measured, each alone.
        mfu: MFU of the training step alone; None if it was not measured.
        run_rate: Images/s of the run end to end; None if it was not measured.
        setup: What the advice depends on.
    """
    overlapping = data_rates(rates, setup.decodes_on_gpu)
    training = {name: rates[name] for name in TRAINING if name in rates}
    if training:
        overlapping["training"] = combined_rate(training.values())
    slowest = min(overlapping, key=lambda name: overlapping[name])
    others = [value for name, value in overlapping.items() if name != slowest]
    factor = min(others) / overlapping[slowest] if others else 1.0
    limit = min(training, key=lambda name: training[name]) if slowest == "training" else _slowest_stage(slowest, rates)
    advice = advise(limit, mfu, setup)
    words = f"{limit} limits the run: {_comparison(slowest, factor, others)}."
    if run_rate is not None and run_rate < _CONTENDED * overlapping[slowest]:
        words += f" End to end the run reaches {run_rate / overlapping[slowest]:.0%} of that limit"
        words += "." if setup.on_gpu else ": on a CPU the loader and the step share the cores."
    words += f" Most likely to help: {advice.setting}: {advice.value} ({advice.why})."
    return Bottleneck(limit, factor, advice, words)


def data_rates(rates: dict[str, float], decodes_on_gpu: bool) -> dict[str, float]:
    """Images/s of the stages that overlap with the step; decoding and resizing are one stage where they share cores."""
    data: dict[str, float] = {name: rates[name] for name in DATA if name in rates}
    if "storage" in data and "read" in data and data["read"] >= _STORAGE_BOUND * data["storage"]:
        data["storage"] = min(data["storage"], data.pop("read"))
    if not decodes_on_gpu and "decode" in data and "augment" in data:
        data["decoder"] = combined_rate([data.pop("decode"), data.pop("augment")])
    return data


def combined_rate(rates: Iterable[float]) -> float:
    """Images/s of stages that run one after the other."""
    return 1 / sum(1 / rate for rate in rates)


def advise(limit: str, mfu: float | None, setup: RunSetup) -> Advice:
    """The setting most likely to help a run that the stage `limit` slows down."""
    larger_batch = Advice(
        "optim.batch_size", str(2 * setup.batch_size), "fewer updates per image; this is another experiment"
    )
    more_ranks = Advice("--nproc", str(2 * setup.world_size), "this machine is at its limit; add ranks")
    if limit == "storage":
        if setup.shuffle != "block":
            return Advice("data.shuffle", "block", "long reads instead of one per image")
        if not setup.local:
            return Advice("data.dataset", "a folder on a local disk", "the remote storage is at its limit")
        return Advice("data.dataset", "what `maelstream pack --resize 256` makes", "fewer bytes per image")
    if limit == "read":
        return Advice("loader.prefetch", str(2 * setup.prefetch), "reads further ahead, so slow reads delay no batch")
    if limit in ("decode", "augment"):
        if setup.decodes_on_gpu:
            load = min(1.0, round(setup.hw_decoder_load + 0.1, 2))
            return Advice("loader.decode.hw_decoder_load", str(load), "more images for the GPU's hardware JPEG decoder")
        if setup.on_gpu:
            return Advice("loader.decode.on", "gpu", "nvJPEG decodes, and no image is copied")
        if setup.threads < setup.cores:
            return Advice("loader.threads", str(setup.cores), f"{setup.threads} of {setup.cores} cores decode")
        if not setup.dct_scaling:
            return Advice("loader.decode.dct_scaling", "true", "fewer pixels of large images; pixels change slightly")
        return more_ranks
    if limit == "copy":
        return Advice("loader.decode.on", "gpu", "images are decoded where the model is")
    if limit == "optimizer":
        if setup.offload_optimizer:
            return Advice("engine.offload_optimizer", "false", "weights and moments stay in GPU memory")
        return larger_batch
    if limit == "comm":
        if setup.zero > 1:
            return Advice("engine.zero", str(setup.zero - 1), "less communication")
        return larger_batch
    if setup.activation_checkpointing:
        return Advice("engine.activation_checkpointing", "false", "no second forward pass, if memory suffices")
    if setup.on_gpu and setup.precision == "fp32":
        return Advice("engine.precision", "bf16", "uses tensor cores")
    if mfu is not None and mfu >= _COMPUTE_BOUND_MFU:
        return more_ranks
    if not setup.compile and setup.zero < 3:
        return Advice("engine.compile", "true", "less memory traffic between matrix products")
    return Advice("engine.micro_batch_size", str(2 * setup.micro_batch_size), "larger matrix products")


def _slowest_stage(part: str, rates: dict[str, float]) -> str:
    return min(("decode", "augment"), key=lambda name: rates[name]) if part == "decoder" else part


def _comparison(slowest: str, factor: float, others: list[float]) -> str:
    if not others:
        return "nothing else was measured"
    other = "the data path" if slowest == "training" else "everything else"
    return f"{other} could go {factor:,.1f} times as fast"
