"""Imports all modules that a rank needs, in the process that tests/helpers/forked.py forks from."""

import gc
import importlib
import logging
import os

# A forked process cannot use CUDA if its parent has initialised it; `make gpu-check` starts new processes on GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from maelstream.jobs.command import COMMANDS

os.environ.setdefault("OMP_NUM_THREADS", "1")
for _module in (
    # Commands import what they need only after their checks.
    "maelstream.jobs.training.pretraining",
    "maelstream.jobs.training.trainer",
    "maelstream.jobs.reporting.checkpoint_reconstructions",
    "maelstream.jobs.reporting.html_report",
    "maelstream.jobs.profiling.data_stages",
    "maelstream.jobs.profiling.stage_profiler",
    "maelstream.jobs.evaluation.classification",
    "maelstream.jobs.evaluation.evaluating",
    "maelstream.jobs.evaluation.nearest_neighbours",
    "maelstream.jobs.weights.initial",
    "maelstream.jobs.weights.target_file",
    *(f"maelstream.jobs.{command.replace('-', '_')}" for command in COMMANDS),
    "tests.helpers.faults",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine imports it, and it compiles kernels
    "deepspeed.runtime.zero.stage3",
    "nvidia.dali.fn",
    "nvidia.dali.plugin.pytorch",
):
    importlib.import_module(_module)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
torch.set_num_threads(1)
gc.freeze()  # DeepSpeed collects garbage six times at the start
