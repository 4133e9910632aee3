"""Memory traffic of an optimizer step: the formula against the operators of a real DeepSpeed engine."""

import json
from pathlib import Path

import pytest

from maelstream.model.memory import parameter_count, update_bytes
from tests.helpers.forked import CONTEXT, free_port
from tests.helpers.update_bytes import CONFIG, count_update_bytes


def test_update_bytes_equal_those_of_the_operators_of_an_engine(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=count_update_bytes, args=(free_port(), tmp_path / "bytes.json"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    counted = json.loads((tmp_path / "bytes.json").read_text())
    for stage in (1, 2, 3):
        # Norms, flags and step counts are small, but this model is small as well.
        assert counted[str(stage)] == pytest.approx(update_bytes(parameter_count(CONFIG), stage, 1), rel=0.01), stage
