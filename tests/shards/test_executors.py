"""A build by processes or by Ray, killed, stopped or shared between machines, gives the same bytes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from maelstream.jobs.command import run
from maelstream.shards.errors import DatasetError
from maelstream.shards.executors import EXECUTORS, Local, Ray
from maelstream.shards.pack import pack
from tests.conftest import encoded, photograph
from tests.shards.conftest import OPTIONS
from tests.shards.test_pack import digests
from tests.shards.test_sources import write_parquet, write_tar

PACK = ["-c", "import sys; from maelstream.jobs.command import run; sys.exit(run('pack', sys.argv[1:]))"]
SHARDED = ["--name", "tiny", "--shard-size", "30000", "--seed", "3", "--workers", "2"]


def start(source: Path, destination: Path, *more: str) -> subprocess.Popen:
    """Starts `maelstream pack` in its own process group."""
    command = [sys.executable, *PACK, str(source), str(destination), *SHARDED, *more]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: object, process: subprocess.Popen) -> None:
    while process.poll() is None and not condition():  # type: ignore[operator]
        time.sleep(0.001)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The child processes that build shards, without the resource tracker of Python's multiprocessing."""
    return [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]


# --- kill -9


@pytest.fixture(scope="module", params=["folders", "tars", "parquet"])
def source(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 48 images as class folders, as four tars and as four Parquet files."""
    if request.param == "folders":
        return images
    folder = tmp_path_factory.mktemp(request.param)
    files = sorted(images.glob("*/*.jpg"))
    for number in range(4):
        some = files[12 * number : 12 * number + 12]
        if request.param == "tars":
            write_tar(folder / f"{number}.tar", [(f"{n}.jpg", path.read_bytes()) for n, path in enumerate(some)])
        else:
            write_parquet(folder / f"{number}.parquet", {"image": [path.read_bytes() for path in some]})
    return folder


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Digests of an uninterrupted build, and the seconds that it took."""
    destination = tmp_path_factory.mktemp("uninterrupted") / "out"
    began = time.monotonic()
    process = start(source, destination)
    assert process.wait() == 0
    return digests(destination), time.monotonic() - began


@pytest.mark.parametrize("seed", [0, 1])
def test_a_build_killed_at_random_moments_resumes_to_the_same_bytes(
    source: Path, uninterrupted: tuple[dict[str, str], float], tmp_path: Path, seed: int
) -> None:
    """Five builds are killed with all their workers, each at a random moment of a build's duration."""
    expected, build_s = uninterrupted
    random = np.random.default_rng(seed)
    for _ in range(5):
        process = start(source, tmp_path / "out")
        time.sleep(random.uniform(0.2, 1) * build_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(source, tmp_path / "out")
    assert process.wait() == 0, process.communicate()
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("step", ["claim", "plan.arrow", "shard-000001.arrow", "index.arrow", "dataset.json"])
def test_a_build_killed_right_after_a_file_appears_resumes_to_the_same_bytes(
    images: Path, built: Path, tmp_path: Path, step: str
) -> None:
    destination = tmp_path / "out"
    process = start(images, destination)
    wait_until(lambda: (destination / step).exists() or (destination / ".pack" / step).exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pack(str(images), str(destination), OPTIONS, Local(1), lambda _: None)
    assert digests(destination) == digests(built)


def test_workers_end_when_the_builder_is_killed(images: Path, tmp_path: Path) -> None:
    process = start(images, tmp_path / "out")
    wait_until(lambda: (tmp_path / "out" / "tiny-train-000000.tar").exists(), process)
    workers = workers_of(process)
    process.kill()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_the_jobs_of_killed_workers_run_again(images: Path, built: Path, tmp_path: Path) -> None:
    process = start(images, tmp_path / "out")
    wait_until(lambda: (tmp_path / "out" / "tiny-train-000000.tar").exists(), process)
    workers = workers_of(process)
    for worker in workers:
        worker.kill()
    _, printed = process.communicate()
    assert workers and process.returncode == 0, printed
    assert "a worker died; its job runs again" in printed
    assert digests(tmp_path / "out") == digests(built)


@dataclass(frozen=True)
class KillJob:
    """A job that kills its worker."""

    log: Path
    attempt: int = 0


def kill_worker(job: KillJob) -> None:
    with job.log.open("a") as log:
        log.write(f"{job.attempt}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_whose_worker_is_killed_three_times_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="a worker was killed 3 times at the same job, perhaps because memory ran"):
        list(Local(1).run("tests.shards.test_executors:kill_worker", [KillJob(tmp_path / "log")]))
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2"]


# --- Ctrl-C


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Images that take seconds to build, in shards of several images."""
    folder = tmp_path / "slow" / "class"
    folder.mkdir(parents=True)
    large = encoded(photograph(3000, 2000), "JPEG", quality=90).tobytes()
    for number in range(40):
        (folder / f"{number}.jpg").write_bytes(large + bytes([number]))
    return folder.parent


def test_ctrl_c_finishes_the_shards_being_written_and_prints_how_to_resume(slow: Path, tmp_path: Path) -> None:
    destination, options = tmp_path / "out", ["--shard-size", f"{4 * (slow / 'class' / '0.jpg').stat().st_size}"]
    process = start(slow, destination, *options)
    wait_until(lambda: len(list(destination.glob(".pack/shard-*"))) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)  # to every process, as a terminal does
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in printed
    assert printed.splitlines()[-1] == "stopped; run the same command again to build the remaining shards"
    assert "stopping after the files in progress" in printed
    shards = {path.stem[-6:] for path in destination.glob("*.tar")}
    assert 2 <= len(shards) <= 5 and shards == {path.stem[-6:] for path in destination.glob(".pack/shard-*")}
    assert not list(destination.glob(".pack/.*"))  # no partial file is left
    again = start(slow, destination, *options)
    printed = again.communicate()[0]
    assert again.returncode == 0 and f"({len(list(destination.glob('*.tar'))) - len(shards)} built now)" in printed


def test_a_second_ctrl_c_stops_at_once(slow: Path, tmp_path: Path) -> None:
    process = start(slow, tmp_path / "out", "--shard-size", "1GiB")  # all images in one shard
    wait_until(lambda: list((tmp_path / "out" / ".pack").glob(".*.tar.*.writing")), process)
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None and "Ctrl-C again" in process.stderr.readline() + process.stderr.readline()
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130 and time.monotonic() - began < 2
    assert not psutil.wait_procs(workers, timeout=10)[1]


# --- parts and Ray


def test_parts_at_the_same_time_make_one_dataset(
    source: Path, uninterrupted: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    parts = [start(source, tmp_path / "out", "--part", f"{number}/3", "--workers", "1") for number in (1, 2, 3)]
    printed = [part.communicate() for part in parts]
    assert [part.returncode for part in parts] == [0, 0, 0], printed
    assert digests(tmp_path / "out") == uninterrupted[0]
    assert any("48 samples in" in out for out, _ in printed)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b"])
def test_an_invalid_part_is_an_error(
    images: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", [str(images), str(tmp_path / "out"), "--part", part]) == 2
    assert "is no part; write I/N" in capsys.readouterr().err


def test_ray_gives_the_same_bytes_and_rebuilds_the_shard_of_a_lost_worker(
    images: Path, built: Path, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    destination = tmp_path / "out"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    killed: list[int] = []

    def kill_a_worker(_: object) -> None:
        if not killed:
            busy = [child for child in psutil.Process().children(recursive=True) if child.name() == "ray::_call"]
            killed.extend(worker.pid for worker in busy)
            for worker in busy:
                worker.kill()

    try:
        result = pack(str(images), str(destination), OPTIONS, Ray(2), kill_a_worker)
    finally:
        ray.shutdown()
    assert killed
    assert result.built == result.shards
    assert digests(destination) == digests(built)


def test_both_executors_are_offered() -> None:
    assert EXECUTORS == {"local": Local, "ray": Ray}
