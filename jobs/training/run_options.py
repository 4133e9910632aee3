"""Options of every command that trains: pretrain, finetune, linprobe, partial and scratch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is written and how far it trains now."""

    run: Path
    """The run's folder. A run that is already there resumes from its newest checkpoint."""
    stop_at_step: int | None = None
    """Save and stop after this step, instead of at the end of the schedule."""
    allow: tuple[str, ...] = ()
    """Recipe keys whose values may differ from those that the run started with: --allow optim.epochs."""
    print_config: bool = False
    """Print the resolved recipe and exit."""
