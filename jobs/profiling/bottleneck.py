"""Which stage holds a run back, by how much, and the setting most likely to help: a function of figures alone.

Reading, decoding and the step go on side by side, so the slowest of them sets the pace. What comes one after the other
shares its time: copy, step, optimizer and exchange on the device; decoding and resizing where both are done by the same
cores.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from maelstream.pipeline.tracing import STAGES

DATA, TRAINING = STAGES[:4], STAGES[4:]
_OF_STORAGE = 0.8  # of the storage's rate: reading that comes so near is held back by the storage
_BUSY = 0.4  # MFU at which the arithmetic itself is the limit
_DISTURBED = 0.8


@dataclass(frozen=True)
class Situation:
    """What the advice depends on; settings are the recipe's."""

    on_gpu: bool
    """Whether the model is."""
    decodes_on_gpu: bool
    threads: int
    cores: int
    """That this rank may use."""
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
    """One setting of a recipe, and what it does."""

    setting: str
    value: str
    why: str


class Verdict(NamedTuple):
    """`limit` would hold the run back even if everything else took no time."""

    limit: str
    factor: float
    """How many times as fast the run could go if that stage cost nothing: the other side's rate over this one's."""
    advice: Advice
    words: str


def verdict(rates: dict[str, float], mfu: float | None, whole: float | None, situation: Situation) -> Verdict:
    """`rates` are images/s of the stages that were measured, each alone; `mfu` the step's, `whole` the run's rate."""
    data = data_rates(rates, situation.decodes_on_gpu)
    training = {name: rates[name] for name in TRAINING if name in rates}
    sides = dict(data)
    if training:
        sides["training"] = one_after_the_other(training.values())
    slowest = min(sides, key=lambda name: sides[name])
    others = [value for name, value in sides.items() if name != slowest]
    factor = min(others) / sides[slowest] if others else 1.0
    limit = min(training, key=lambda name: training[name]) if slowest == "training" else _stage(slowest, rates)
    advice = advise(limit, mfu, situation)
    words = f"{limit} holds the run back: {_compared(slowest, factor, others)}."
    if whole is not None and whole < _DISTURBED * sides[slowest]:
        words += f" The whole reaches {whole / sides[slowest]:.0%} of what that allows"
        words += "." if situation.on_gpu else ": on a CPU the loader and the step share the cores."
    words += f" Most likely to help: {advice.setting}: {advice.value} ({advice.why})."
    return Verdict(limit, factor, advice, words)


def data_rates(rates: dict[str, float], decodes_on_gpu: bool) -> dict[str, float]:
    """Images/s of what goes on beside the step; decoding and resizing are one where they share cores."""
    data: dict[str, float] = {name: rates[name] for name in DATA if name in rates}
    if "storage" in data and "read" in data and data["read"] >= _OF_STORAGE * data["storage"]:
        data["storage"] = min(data["storage"], data.pop("read"))
    if not decodes_on_gpu and "decode" in data and "augment" in data:
        data["decoder"] = one_after_the_other([data.pop("decode"), data.pop("augment")])
    return data


def one_after_the_other(rates: Iterable[float]) -> float:
    """Images/s of stages that share their time."""
    return 1 / sum(1 / rate for rate in rates)


def advise(limit: str, mfu: float | None, now: Situation) -> Advice:
    """The setting most likely to help where `limit` holds the run back."""
    batch = Advice("optim.batch_size", str(2 * now.batch_size), "spreads it over more images; another experiment")
    ranks = Advice("--nproc", str(2 * now.world_size), "more ranks: the machine does what it can")
    if limit == "storage":
        if now.shuffle != "block":
            return Advice("data.shuffle", "block", "long reads instead of one an image")
        if not now.local:
            return Advice("data.dataset", "a folder on a local disk", "the store sends no faster")
        return Advice("data.dataset", "what `maelstream pack --resize 256` makes", "fewer bytes an image")
    if limit == "read":
        return Advice("loader.prefetch", str(2 * now.prefetch), "further ahead, so that a slow read holds up nobody")
    if limit in ("decode", "augment"):
        if now.decodes_on_gpu:
            load = min(1.0, round(now.hw_decoder_load + 0.1, 2))
            return Advice("loader.decode.hw_decoder_load", str(load), "more for the GPU's own JPEG decoder")
        if now.on_gpu:
            return Advice("loader.decode.on", "gpu", "nvJPEG decodes, and nothing is copied")
        if now.threads < now.cores:
            return Advice("loader.threads", str(now.cores), f"{now.threads} of {now.cores} cores decode")
        if not now.dct_scaling:
            return Advice("loader.decode.dct_scaling", "true", "fewer pixels of large images; not the same ones")
        return ranks
    if limit == "copy":
        return Advice("loader.decode.on", "gpu", "images are decoded where they are used")
    if limit == "optimizer":
        if now.offload_optimizer:
            return Advice("engine.offload_optimizer", "false", "weights and moments stay in the GPU's memory")
        return batch
    if limit == "comm":
        if now.zero > 1:
            return Advice("engine.zero", str(now.zero - 1), "exchanges less")
        return batch
    if now.activation_checkpointing:
        return Advice("engine.activation_checkpointing", "false", "no second forward pass, if the memory is enough")
    if now.on_gpu and now.precision == "fp32":
        return Advice("engine.precision", "bf16", "tensor cores")
    if mfu is not None and mfu >= _BUSY:
        return ranks
    if not now.compile and now.zero < 3:
        return Advice("engine.compile", "true", "fewer passes over the memory between products")
    return Advice("engine.micro_batch_size", str(2 * now.micro_batch_size), "larger products")


def _stage(side: str, rates: dict[str, float]) -> str:
    return min(("decode", "augment"), key=lambda name: rates[name]) if side == "decoder" else side


def _compared(side: str, factor: float, others: list[float]) -> str:
    if not others:
        return "nothing else was measured"
    other = "the data path" if side == "training" else "the rest"
    return f"{other} could go {factor:,.1f} times as fast"
