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
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, Protocol

from maelstream.shards.errors import DatasetError

_ATTEMPTS = 3


class Executor(Protocol):
    """Runs jobs in workers. A job is a dataclass with the field `attempt`: how many workers have died with it."""

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
        remaining = iter(jobs)
        while lost := (yield from self._run_pool(task, remaining)):
            remaining = chain([_next_attempt(job) for job in lost], remaining)

    def _run_pool(self, task: str, remaining: Iterator[Any]) -> Generator[Any, None, list[Any]]:
        """Runs jobs until none remain or a worker dies, which ends the others too; returns the lost jobs."""
        # Spawned, not forked: the caller may have threads.
        pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), start_worker)
        running: dict[Future, Any] = {}
        lost: list[Any] = []
        try:
            while True:
                if not lost:
                    try:  # a job in the pool's queue cannot be cancelled, so the queue stays empty
                        for job in islice(remaining, self.workers - len(running)):
                            running[pool.submit(_call, task, job)] = job
                    except BrokenProcessPool:
                        lost.append(job)
                if not running:
                    return lost
                for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                    job = running.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        lost.append(job)
                    else:
                        yield future.result()
        finally:
            pool.shutdown()


@dataclass(frozen=True)
class Ray:
    """A Ray cluster: the one that RAY_ADDRESS names, or one on this machine."""

    workers: int

    def __post_init__(self) -> None:
        _check_workers(self.workers)

    def run(self, task: str, jobs: Iterable[Any]) -> Generator[Any, None, None]:
        try:
            import ray
        except ImportError:
            raise DatasetError("--executor ray needs Ray: pip install 'maelstream[ray]'") from None
        with _ray_cluster(ray, self.workers):
            remote = ray.remote(num_cpus=1, max_retries=0)(_call)
            remaining = iter(jobs)
            running: dict[Any, Any] = {}
            while True:
                for job in islice(remaining, self.workers - len(running)):
                    running[remote.remote(task, job)] = job
                if not running:
                    return
                (done,), _ = ray.wait(list(running))
                job = running.pop(done)
                try:
                    yield ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError:
                    remaining = chain([_next_attempt(job)], remaining)


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


def _next_attempt(job: Any) -> Any:
    """A lost job, to be run again, isolated (`shards/checks.py`)."""
    if job.attempt + 1 == _ATTEMPTS:
        raise DatasetError(
            f"a worker was killed {_ATTEMPTS} times at the same job, perhaps because memory ran out; run the same "
            "command again to do the rest, with fewer --workers if so"
        )
    print("a worker died; its job runs again, with each image checked in another process", file=sys.stderr)
    return replace(job, attempt=job.attempt + 1)


def start_worker() -> None:
    """Prepares a worker process: it ends with its parent, and leaves Ctrl-C to it."""
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
