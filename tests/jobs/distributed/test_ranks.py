"""A single rank leaves no variables in the environment, which a process started later would read as its rank."""

import os

import pytest

from maelstream.jobs.distributed.errors import RanksError
from maelstream.jobs.distributed.ranks import Ranks, process_group, ranks_from_environment


def test_a_single_rank_restores_the_environment() -> None:
    before = dict(os.environ)
    for _ in range(2):
        with process_group(ranks_from_environment(), 60) as control_group:
            assert control_group.sums([2.5]) == [2.5] and os.environ["WORLD_SIZE"] == "1"
        assert dict(os.environ) == before


SBATCH = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_an_sbatch_script_without_srun_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_only(monkeypatch, SBATCH)
    assert ranks_from_environment() == Ranks(0, 1, 0, 1)


def test_srun_sets_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "MASTER_ADDR": "a"}
    set_only(monkeypatch, SBATCH | step)
    assert ranks_from_environment() == Ranks(3, 4, 1, 2) and os.environ["MASTER_PORT"] == "20017"


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"RANK": "first"}, "RANK=first is not a number from 0"),
        ({"RANK": "-1"}, "RANK=-1 is not a number from 0"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0 is not a number from 0"),
        ({"WORLD_SIZE": "9" * 50}, "WORLD_SIZE=9999"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 do not fit together"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "do not fit together"),
        (SBATCH | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NTASKS": "four"}, "SLURM_NTASKS=four is not a number"),
        (SBATCH | {"SLURM_STEP_TASKS_PER_NODE": "x", "MASTER_ADDR": "a"}, "LOCAL_WORLD_SIZE=x is not a number"),
    ],
)
def test_wrong_variables_of_a_launcher_are_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], complaint: str
) -> None:
    set_only(monkeypatch, variables)
    with pytest.raises(RanksError, match=complaint):
        ranks_from_environment()


def set_only(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Leaves only `variables` of those that launchers set; all are restored after the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in names]:
        del os.environ[name]
    os.environ.update(variables)
