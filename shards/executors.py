"""Run a build's jobs in processes of this machine or on a Ray cluster; both yield results as they finish."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, Protocol

from maelstream.shards.errors import DatasetError


class Executor(Protocol):
    """Runs jobs in workers."""

    def run(self, task: str, jobs: Iterable[Any]) -> Generator[Any, None, None]:
        """Yields the results of `task` ("module:function") for each of `jobs`, in any order; raises the first failure.

        If the caller stops early, running jobs finish and no other job starts.
        """


@dataclass(frozen=True)
class Local:
    """Processes of this machine."""

    workers: int

    def __post_init__(self) -> None:
        _check_workers(self.workers)

    def run(self, task: str, jobs: Iterable[Any]) -> Generator[Any, None, None]:
        # Spawned, not forked: the caller may have threads.
        pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), _start_worker)
        remaining = iter(jobs)
        running: set[Future] = set()
        try:
            while True:
                # A job in the pool's queue cannot be cancelled, so the queue stays empty.
                running |= {pool.submit(_call, task, job) for job in islice(remaining, self.workers - len(running))}
                if not running:
                    return
                done, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise DatasetError(
                "a worker was killed, perhaps because memory ran out; run the same command again to build the "
                "remaining shards, with fewer --workers if so"
            ) from None
        finally:
            pool.shutdown()


@dataclass(frozen=True)
class Ray:
    """A Ray cluster: the one that RAY_ADDRESS names, or one on this machine. Jobs of lost workers run again."""

    workers: int

    def __post_init__(self) -> None:
        _check_workers(self.workers)

    def run(self, task: str, jobs: Iterable[Any]) -> Generator[Any, None, None]:
        try:
            import ray
        except ImportError:
            raise DatasetError("--executor ray needs Ray: pip install 'maelstream[ray]'") from None
        with _ray_cluster(ray, self.workers):
            remote = ray.remote(num_cpus=1, max_retries=3)(_call)
            remaining = iter(jobs)
            running: list[Any] = []
            while True:
                running += [remote.remote(task, job) for job in islice(remaining, self.workers - len(running))]
                if not running:
                    return
                (done,), running = ray.wait(running)
                try:
                    yield ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    raise DatasetError(
                        f"Ray lost the worker of a job four times ({type(error).__name__}); run the same command again"
                    ) from None


@contextmanager
def _ray_cluster(ray: Any, workers: int) -> Iterator[None]:
    address = os.environ.get("RAY_ADDRESS")
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address, num_cpus=None if address else workers, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


EXECUTORS: dict[str, Callable[[int], Executor]] = {"local": Local, "ray": Ray}


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise DatasetError(f"--workers {workers}: at least one is needed")


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides how to stop
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def _call(task: str, job: Any) -> Any:
    # webdataset imports torch if it is installed: 4 s and 500 MiB per worker, and packing does not need it.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None makes the import fail
    module, name = task.split(":")
    return getattr(import_module(module), name)(job)
