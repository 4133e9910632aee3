"""Fixtures: outputs of the reference implementation (tests/golden) and the devices to test on."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import DEVICES

FOLDER = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
    """A function: `golden("f64/mae_small")` returns the arrays of that file by name."""
    return lambda name: np.load(FOLDER / f"{name}.npz")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU if there is one."""
    return torch.device(request.param)
