"""Bottlenecks of invented rates: every stage can be the limit, and has its own advice, on keys that a recipe has."""

from dataclasses import replace

import pytest

from maelstream.jobs.profiling.bottleneck import RunSetup, advise, data_rates, find_bottleneck
from maelstream.jobs.recipe import Recipe
from maelstream.pipeline.config import STAGES

GPU = RunSetup(
    on_gpu=True,
    decodes_on_gpu=True,
    threads=8,
    cores=16,
    world_size=2,
    local=True,
    shuffle="global",
    dct_scaling=False,
    hw_decoder_load=0.65,
    prefetch=4,
    micro_batch_size=64,
    batch_size=4096,
    precision="bf16",
    zero=1,
    compile=False,
    activation_checkpointing=False,
    offload_optimizer=False,
)
DECODES_ON_CPU = replace(GPU, decodes_on_gpu=False)
CPU = replace(DECODES_ON_CPU, on_gpu=False)
FAST = dict.fromkeys(STAGES, 1e6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_slowest_stage_is_the_limit(stage: str) -> None:
    rates = FAST | {stage: 1000.0}
    if stage == "storage":
        rates["read"] = 1000.0  # reading cannot be faster than the storage
    found = find_bottleneck(rates, 0.3, None, GPU)
    assert found.limit == stage
    assert found.factor == pytest.approx(
        250 if stage in STAGES[:4] else 1000, rel=0.01
    )  # the four training stages share their time
    assert found.words.startswith(f"{stage} limits the run") and found.advice.setting in found.words


def test_reading_as_fast_as_the_storage_is_limited_by_the_storage_and_slower_reading_is_not() -> None:
    assert find_bottleneck(FAST | {"storage": 1000.0, "read": 900.0}, None, None, GPU).limit == "storage"
    assert find_bottleneck(FAST | {"storage": 1000.0, "read": 500.0}, None, None, GPU).limit == "read"


def test_decoding_and_resizing_share_cores_only_on_a_cpu() -> None:
    rates = {"decode": 1000.0, "augment": 1000.0}
    assert data_rates(rates, decodes_on_gpu=True) == rates
    assert data_rates(rates, decodes_on_gpu=False) == {"decoder": 500.0}
    step = {"step": 700.0}
    assert find_bottleneck(rates | step, 0.9, None, CPU).limit in ("decode", "augment")
    assert find_bottleneck(rates | step, 0.9, None, GPU).limit == "step"


def test_a_run_slower_than_its_slowest_stage_is_reported() -> None:
    rates = FAST | {"step": 1000.0}
    assert "reaches 50%" in find_bottleneck(rates, 0.5, 500.0, CPU).words
    assert "share the cores" in find_bottleneck(rates, 0.5, 500.0, CPU).words
    assert "reaches" not in find_bottleneck(rates, 0.5, 950.0, CPU).words


ADVICE = [
    ("storage", GPU, "data.shuffle", "block"),
    ("storage", replace(GPU, shuffle="block", local=False), "data.dataset", "a folder on a local disk"),
    ("storage", replace(GPU, shuffle="block"), "data.dataset", "what `maelstream pack --resize 256` makes"),
    ("read", GPU, "loader.prefetch", "8"),
    ("decode", GPU, "loader.decode.hw_decoder_load", "0.75"),
    ("decode", DECODES_ON_CPU, "loader.decode.on", "gpu"),
    ("augment", CPU, "loader.threads", "16"),
    ("augment", replace(CPU, threads=16), "loader.decode.dct_scaling", "true"),
    ("augment", replace(CPU, threads=16, dct_scaling=True), "--nproc", "4"),
    ("copy", DECODES_ON_CPU, "loader.decode.on", "gpu"),
    ("step", GPU, "engine.compile", "true"),
    ("step", replace(GPU, compile=True), "engine.micro_batch_size", "128"),
    ("step", replace(GPU, activation_checkpointing=True), "engine.activation_checkpointing", "false"),
    ("step", replace(GPU, precision="fp32"), "engine.precision", "bf16"),
    ("optimizer", GPU, "optim.batch_size", "8192"),
    ("optimizer", replace(GPU, offload_optimizer=True), "engine.offload_optimizer", "false"),
    ("comm", replace(GPU, zero=3), "engine.zero", "2"),
    ("comm", GPU, "optim.batch_size", "8192"),
]


@pytest.mark.parametrize(("limit", "setup", "setting", "value"), ADVICE)
def test_advice_is_a_key_that_a_recipe_has(limit: str, setup: RunSetup, setting: str, value: str) -> None:
    advice = advise(limit, 0.2, setup)
    assert (advice.setting, advice.value) == (setting, value)
    value_of_key: object = Recipe()
    for name in [] if setting.startswith("--") else setting.split("."):
        value_of_key = getattr(value_of_key, name)


def test_a_compute_bound_step_is_advised_to_use_more_ranks() -> None:
    assert advise("step", 0.6, GPU).setting == "--nproc"
