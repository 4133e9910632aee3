"""Runs a build of shards for a command: shows its progress and prints its result."""

import sys
from collections.abc import Callable

from maelstream.jobs.reporting.progress import PackProgress, interruptible
from maelstream.shards.pack import PackResult, Report
from maelstream.shards.storage import Storage


def run_build(build: Callable[[Report], PackResult], dst: str) -> int:
    """Runs `build`, shows its progress and prints its result; returns 0, or 130 after Ctrl-C."""
    folder = Storage.at(dst)  # prints a URI without its credentials
    try:
        with interruptible(), PackProgress() as display:
            result = build(display)
    except KeyboardInterrupt:
        print("stopped; run the same command again to build the remaining shards", file=sys.stderr)
        return 130
    if result.missing:
        print(f"{folder}: {result.built:,} shards built now; {result.missing:,} of {result.shards:,} are still missing")
        return 0
    print(
        f"{folder}: {result.samples:,} samples in {result.shards:,} shards ({result.built:,} built now), "
        f"{result.quarantined:,} files quarantined"
        + (f", listed in {folder}/quarantine.jsonl" if result.quarantined else "")
    )
    return 0
