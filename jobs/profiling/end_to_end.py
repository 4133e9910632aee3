"""Measures a run end to end for a few seconds: loader, engine and `train_step`; data wait, utilisation, memory."""

import contextlib
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from maelstream.jobs.distributed.ranks import ControlGroup
from maelstream.jobs.hardware import synchronise
from maelstream.jobs.profiling.data_stages import DataPath
from maelstream.jobs.training.log import Clock
from maelstream.jobs.training.pretraining import reconstruction_loss
from maelstream.jobs.training.step import train_step
from maelstream.pipeline.producer import Batch
from maelstream.pipeline.tracing import traced_with
from maelstream.shards.errors import MaelstreamError

_WARM_UP = 2  # steps
_MIN_STEPS = 3  # steps that count
_TRACED_STEPS = 3
_SAMPLE_S = 0.1


class EndToEndStats(NamedTuple):
    """Rates of all ranks together; times, utilisation and memory of this rank. The fields are keys of the JSON."""

    steps: int
    images_per_s: float
    step_s: float
    """Median."""
    data_wait: float
    """Share of the time that the step waited for images."""
    data_wait_p50_s: float
    """Median data wait of a step."""
    data_wait_p99_s: float
    cpu_utilisation: float
    """Share of the time of the available cores that this process used."""
    gpu_utilisation: float | None
    """Share of the time in which the GPU was busy, by NVML; None without a GPU or NVML."""
    rss_bytes: int
    """Peak resident memory of this process."""
    gpu_bytes: int | None
    """Peak memory that torch allocated on the GPU; None without a GPU."""


def measure_end_to_end(
    engine: Any,
    data_path: DataPath,
    control_group: ControlGroup,
    micro_batches: int,
    seconds: float,
    trace: Path | None,
) -> EndToEndStats:
    """Takes steps for about `seconds`; with `trace`, records three more steps in that file."""
    clock, batch_split, gpu = Clock(), data_path.batch_split, engine.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()

    def loss(images: Tensor, batch: Batch, micro_batch: int) -> Tensor:
        return reconstruction_loss(engine, images, batch)

    def step(batches: Iterator[Batch]) -> tuple[float, float]:
        train_step(engine, loss, batches, micro_batches, clock, lambda: None, control_group)
        synchronise(engine.device)
        return clock.take()

    with data_path.loader() as loader:
        batches = iter(loader)
        clock.take()
        warm = [step(batches)[0] for _ in range(_WARM_UP)]
        (total_s,) = control_group.sums([warm[-1]])  # the same on all ranks, which then take as many steps
        steps = max(_MIN_STEPS, int(seconds * control_group.ranks.world_size / total_s))
        with GpuUtilisation() if gpu else contextlib.nullcontext() as sampled:
            began, cpu_began = time.perf_counter(), time.process_time()
            times = [step(batches) for _ in range(steps)]
            wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        if trace is not None:
            write_trace(lambda: [step(batches) for _ in range(_TRACED_STEPS)], trace, control_group.ranks.rank)
    waits = np.array([seconds * share for seconds, share in times])
    return EndToEndStats(
        steps=steps,
        images_per_s=steps * batch_split.batch_size / wall_s,
        step_s=statistics.median(seconds for seconds, _ in times),
        data_wait=float(waits.sum()) / wall_s,
        data_wait_p50_s=float(np.quantile(waits, 0.5)),
        data_wait_p99_s=float(np.quantile(waits, 0.99)),
        cpu_utilisation=cpu_s / wall_s / len(os.sched_getaffinity(0)),
        gpu_utilisation=sampled.mean if sampled is not None else None,
        rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        gpu_bytes=torch.cuda.max_memory_allocated() if gpu else None,
    )


class GpuUtilisation:
    """A context manager that samples the GPU's utilisation in a thread, by NVML."""

    def __init__(self) -> None:
        self._samples: list[int] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="utilisation", daemon=True)

    def __enter__(self) -> "GpuUtilisation":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    @property
    def mean(self) -> float | None:
        """Mean utilisation, 0 to 1; None where NVML or its package nvidia-ml-py is missing."""
        return statistics.mean(self._samples) / 100 if self._samples else None

    def _run(self) -> None:
        while not self._stopped.wait(_SAMPLE_S):
            try:
                self._samples.append(torch.cuda.utilization())
            except (ModuleNotFoundError, RuntimeError):
                return


def write_trace(work: Callable[[], object], file: Path, rank: int) -> None:
    """Runs `work` under torch.profiler, with the stages of all threads as ranges; rank 0 writes a trace for Perfetto.

    Raises:
        MaelstreamError: the file cannot be written, or the profiler is not permitted.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    try:
        with profile(activities=activities, experimental_config=everywhere) as profiler, traced_with(record_function):
            work()
    except RuntimeError as error:
        if "profil" not in str(error).lower() and "cupti" not in str(error).lower():
            raise
        reason = str(error).splitlines()[0]
        raise MaelstreamError(
            f"--trace: the profiler is not permitted here ({reason}); see NVIDIA's ERR_NVGPUCTRPERM, "
            "or run without --trace"
        ) from None
    if rank == 0:
        try:
            file.touch()  # the exporter gives no reason when it fails
            profiler.export_chrome_trace(str(file))
        except OSError as error:
            raise MaelstreamError(f"--trace {file} cannot be written ({error.strerror})") from None
