"""What a start of a run records about itself."""

from pathlib import Path

import pytest

import maelstream.jobs.pretrain
from maelstream.jobs.run_folder.environment import typed_command

JOBS = Path(maelstream.jobs.pretrain.__file__).parent


@pytest.mark.parametrize(
    "argv",
    [
        ["/env/bin/maelstream", "pretrain", "my recipe.yaml", "--run", "a"],
        [str(JOBS / "command.py"), "pretrain", "my recipe.yaml", "--run", "a"],  # python -m, maelstream launch
        [str(JOBS / "pretrain.py"), "--local_rank=1", "my recipe.yaml", "--run", "a"],  # deepspeed --module
    ],
    ids=["script", "module", "deepspeed"],
)
def test_the_command_is_recorded_as_it_is_typed(argv: list[str]) -> None:
    assert typed_command(argv) == "maelstream pretrain 'my recipe.yaml' --run a"


def test_a_module_s_file_names_its_command() -> None:
    assert typed_command([str(JOBS / "fit_pca.py"), "x"]) == "maelstream fit-pca x"
    assert typed_command(["other/pretrain.py", "x"]) == "pretrain.py x"  # a script of the user's own
