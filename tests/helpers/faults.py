"""Faults that a test injects into a rank before it starts, by name and value: `kill_at_file_operation:7`."""

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

FAULTS: dict[str, Callable[[str], None]] = {}


def _fault(function: Callable[[str], None]) -> Callable[[str], None]:
    FAULTS[function.__name__] = function
    return function


def _at_step(step: int, act: Callable[[], None]) -> None:
    """Calls `act` in the forward pass number `step`, counted from 1 at each start."""
    from maelstream.model.mae import MAE

    before, calls = MAE.forward, [0]

    def forward(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            act()
        return before(self, *args)

    MAE.forward = forward  # type: ignore[assignment, method-assign]


@_fault
def as_other_user(_: str) -> None:
    """Drops all capabilities, so that permissions of files apply to root as well."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


@_fault
def stop_process(step: str) -> None:
    """Stops the process, as if its host hung."""
    _at_step(int(step), lambda: os.kill(os.getpid(), signal.SIGSTOP))


@_fault
def sleep_in_step(step: str) -> None:
    """Blocks the main thread; the other threads of the process continue."""
    _at_step(int(step), lambda: time.sleep(1000))


@_fault
def die(step: str) -> None:
    _at_step(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))


@_fault
def nan_loss(steps: str) -> None:
    """Makes the loss of these steps NaN: "3", or "3-6"."""
    from maelstream.model.mae import MAE

    first, _, last = steps.partition("-")
    before, calls = MAE.forward, [0]

    def forward(self: Any, *args: Any) -> Any:
        calls[0] += 1
        loss = before(self, *args)
        return loss * float("nan") if int(first) <= calls[0] <= int(last or first) else loss

    MAE.forward = forward  # type: ignore[assignment, method-assign]


@_fault
def nan_gradient(step: str) -> None:
    """Makes the gradient of a finite loss infinite."""
    from maelstream.model.mae import MAE

    before, calls = MAE.forward, [0]

    def forward(self: Any, *args: Any) -> Any:
        calls[0] += 1
        loss = before(self, *args)
        if calls[0] == int(step):
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    MAE.forward = forward  # type: ignore[assignment, method-assign]


@_fault
def kill_at_file_operation(number: str) -> None:
    """Kills the process at the n-th open, sync, rename, mkdir or removal below `checkpoints/`."""
    done = [0]

    def count(what: str) -> None:
        if "checkpoints" in what:
            done[0] += 1
            if done[0] == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            count(str(args[0]))

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = counted_fsync  # type: ignore[assignment]
    sys.addaudithook(audit)


@_fault
def slow_save(seconds: str) -> None:
    """Delays each file of a checkpoint."""
    import maelstream.jobs.checkpointing.saver

    before = maelstream.jobs.checkpointing.saver.write_tensors

    def write_tensors(*args: Any) -> Any:
        time.sleep(float(seconds))
        return before(*args)

    maelstream.jobs.checkpointing.saver.write_tensors = write_tensors  # type: ignore[assignment]


@_fault
def full_disk(files: str) -> None:
    """Fails these checkpoint files of the rank, counted from 1, for lack of space: "3", or "3-6"."""
    import maelstream.jobs.checkpointing.saver

    first, _, last = files.partition("-")
    before, count = maelstream.jobs.checkpointing.saver.write_tensors, [0]

    def write_tensors(*args: Any) -> Any:
        count[0] += 1
        if int(first) <= count[0] <= int(last or first):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        return before(*args)

    maelstream.jobs.checkpointing.saver.write_tensors = write_tensors  # type: ignore[assignment]


@_fault
def slow_storage(seconds: str) -> None:
    """Delays each read of a shard, as object storage does."""
    import maelstream.jobs.profiling.stage_profiler
    from benchmarks.store import SlowStorage
    from maelstream.shards.dataset import Dataset

    before = maelstream.jobs.profiling.stage_profiler.open_data

    def open_data(*args: Any) -> Any:
        dataset, order = before(*args)
        assert isinstance(dataset, Dataset)
        return Dataset.open_storage(SlowStorage.over(dataset, float(seconds))), order

    maelstream.jobs.profiling.stage_profiler.open_data = open_data  # type: ignore[assignment]


@_fault
def slow_decode(seconds: str) -> None:
    """Delays the decoding of each micro-batch."""
    from maelstream.pipeline.decode import CpuDecoder

    before = CpuDecoder.decode

    def decode(self: CpuDecoder) -> Any:
        time.sleep(float(seconds))
        return before(self)

    CpuDecoder.decode = decode  # type: ignore[method-assign]


@_fault
def slow_step(seconds: str) -> None:
    """Delays each forward pass."""
    from maelstream.model.mae import MAE

    before = MAE.forward

    def forward(self: Any, *args: Any) -> Any:
        time.sleep(float(seconds))
        return before(self, *args)

    MAE.forward = forward  # type: ignore[assignment, method-assign]


@_fault
def slow_evaluation(seconds: str) -> None:
    """Delays each micro-batch of an evaluation."""
    import maelstream.jobs.evaluation.classifier_evaluator as module

    before = module.classify_with

    def classify_with(*args: Any) -> Any:
        classify = before(*args)

        def classify_slowly(images: Any) -> Any:
            time.sleep(float(seconds))
            return classify(images)

        return classify_slowly

    module.classify_with = classify_with  # type: ignore[assignment]


@_fault
def little_memory(size_and_bf16: str) -> None:
    """The machine has this many bytes free, and its CPU multiplies bf16 ("1") or does not ("0"): "1000000,1"."""
    import maelstream.jobs.profiling.step_stages

    size, bf16 = map(int, size_and_bf16.split(","))
    maelstream.jobs.profiling.step_stages.free_bytes = lambda device: size
    maelstream.jobs.profiling.step_stages.multiplies_bf16 = lambda device: bool(bf16)


@_fault
def out_of_memory(most: str) -> None:
    """Raises an out-of-memory error for larger micro-batches, as a GPU does."""
    import torch

    from maelstream.model.mae import MAE

    before = MAE.forward

    def forward(self: Any, images: Any, keys: Any) -> Any:
        if len(images) > int(most):
            raise torch.OutOfMemoryError
        return before(self, images, keys)

    MAE.forward = forward  # type: ignore[method-assign]


@_fault
def no_profiler(reason: str) -> None:
    """Makes the profiler fail, as a driver that permits only root to profile."""
    import maelstream.jobs.profiling.end_to_end

    def profile(**_: object) -> Any:
        raise RuntimeError(reason)

    maelstream.jobs.profiling.end_to_end.profile = profile  # type: ignore[assignment, misc]


@_fault
def feistel_for_small_sets(_: str) -> None:
    """Orders sets of up to 16 samples as version 0.1 did."""
    from maelstream.pipeline import order

    order._RANKED = 0
