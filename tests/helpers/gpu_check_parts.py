"""Parts for tests of `make gpu-check`: they pass, fail, raise, crash, hang, or lack something."""

import os
import signal
import time
from typing import Any

from benchmarks.gpu_part import CannotRun, Row, Setting


def passes(setting: Setting, *arguments: Any) -> list[Row]:
    return [
        Row("a claim", "at least 1", f"found {arguments}", True, {"number": 2}),
        Row("a figure", "", "3 of them", True, {}),
    ]


def fails(setting: Setting) -> list[Row]:
    return [Row("one claim", "1", "1", True, {}), Row("another claim", "at least 1", "0", False, {"number": 0})]


def raises(setting: Setting) -> list[Row]:
    raise ValueError("three is not four")


def crashes(setting: Setting) -> list[Row]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def hangs(setting: Setting) -> list[Row]:
    if os.fork() == 0:  # a child process that must be killed, too
        time.sleep(1000)
    time.sleep(1000)
    return []


def writes_no_result(setting: Setting) -> list[Row]:
    os._exit(0)


def lacks_data(setting: Setting) -> list[Row]:
    raise CannotRun("no photographs[dev]\nand more")


def lacks_a_package(setting: Setting) -> list[Row]:
    import no_such_package  # type: ignore[import-not-found]  # noqa: F401

    return []


def lacks_a_module_of_this_project(setting: Setting) -> list[Row]:
    import benchmarks.no_such_module  # type: ignore[import-not-found]  # noqa: F401

    return []
