"""The options that `evaluate` and `knn` share: how they read images, and where the result goes."""

from dataclasses import dataclass
from pathlib import Path

from maelstream.jobs.distributed.ranks import Ranks
from maelstream.jobs.recipe import RecipeError
from maelstream.pipeline.config import DecodeConfig, LoaderConfig
from maelstream.pipeline.eval_pass import Reading
from maelstream.shards.durable import can_write


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How every image is read once, and where the result goes."""

    margin: float | None = None
    """Size of the resized image divided by the size of the crop. Default: the run's margin if its recipe has one, and
    otherwise the reference's: 256 / 224 up to 224 px and 1 above."""
    heads: int | None = None
    """Attention heads, for a file that does not store their number; dim / 64 if not given."""
    micro_batch_size: int = 64
    """Images per rank and forward pass."""
    threads: int = 0
    """Decoding threads per rank; 0: the machine's cores divided by its ranks."""
    decode: DecodeConfig = DecodeConfig()
    folder: Path | None = None
    """Folder for result.json; if not given, a folder in `evaluations/` of the run or, for a file, in runs/."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.threads < 0 or (self.margin is not None and self.margin < 1):
            raise RecipeError(
                f"--micro-batch-size {self.micro_batch_size} and --margin {self.margin} must be at least 1, "
                f"--threads {self.threads} at least 0"
            )

    def reading(self, image_size: tuple[int, int], margin: float | None, ranks: Ranks) -> Reading:
        """How to read images of the model's `image_size`; `margin` is the recipe's, if it has one."""
        loader = LoaderConfig(self.threads or ranks.threads, decode=self.decode)
        return Reading(image_size, self.margin or margin, self.micro_batch_size, loader)

    def result_folder(self, weights: Path, step: int | None, name: str) -> Path:
        """The folder of the result: inside the run `weights` if there is a `step`, below runs/ for a file.

        For another user's run, which only that user may write to, it is below runs/ as well.

        Raises:
            RecipeError: files cannot be written there.
        """
        in_run = weights / "evaluations" / f"{name}-step-{step or 0:08d}"
        below_runs = Path("runs") / f"{name}-{weights.absolute().name}"
        folder = self.folder or (below_runs if step is None or not can_write(in_run) else in_run)
        if not can_write(folder):
            raise RecipeError(f"{folder} cannot be written; give a folder that you may write to with --folder")
        return folder
