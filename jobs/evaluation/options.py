"""What commands that measure without training have in common: `evaluate` and `knn`."""

from dataclasses import dataclass
from pathlib import Path

from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.recipe import RecipeError
from maelstream.pipeline.decode import DecodeConfig
from maelstream.pipeline.eval_pass import Reading, evaluation_margin


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How every image is read once, and where the result goes."""

    margin: float | None = None
    """Size of the resized image over the crop's; the run's, or 256 / 224 up to 224 px and 1 beyond, if not given."""
    heads: int | None = None
    """Of the attention, where a file does not tell; dim / 64 if not given."""
    micro_batch_size: int = 64
    """Images a rank puts through the model at once."""
    threads: int = 0
    """Threads that decode in each rank; 0: the machine's cores shared by its ranks."""
    decode: DecodeConfig = DecodeConfig()
    folder: Path | None = None
    """Where result.json goes; in the run's folder `evaluations/`, or in runs/, if not given."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.threads < 0 or (self.margin is not None and self.margin < 1):
            raise RecipeError(
                f"--micro-batch-size {self.micro_batch_size} and --margin {self.margin} must be at least 1, "
                f"--threads {self.threads} at least 0"
            )

    def reading(self, image_size: tuple[int, int], margin: float | None, ranks: Ranks) -> Reading:
        """Of images of the model's size; `margin` is the one that the model was trained with, where it was."""
        margin = self.margin or margin or evaluation_margin(image_size)
        return Reading(image_size, margin, self.micro_batch_size, self.threads or ranks.threads, decode=self.decode)

    def result_folder(self, weights: Path, step: int | None, name: str) -> Path:
        """Into the run that the weights are of, if they are of one: it has a `step`."""
        in_run = weights / "evaluations" / f"{name}-step-{step or 0:08d}"
        return self.folder or (Path("runs") / f"{name}-{weights.name}" if step is None else in_run)
