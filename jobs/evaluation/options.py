"""The options of `evaluate` and `knn`: how they read images, where the result goes, and how neighbours vote."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maelstream.jobs.recipe import RecipeError
from maelstream.model.config import Pool
from maelstream.pipeline.config import DecodeConfig, LoaderConfig
from maelstream.shards.dataset import Dataset
from maelstream.shards.durable import can_write

if TYPE_CHECKING:  # torch, DALI and DeepSpeed take seconds to import, and the options are checked without them
    from maelstream.jobs.distributed.ranks import Ranks
    from maelstream.pipeline.eval_pass import Reading


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

    def reading(self, image_size: tuple[int, int], margin: float | None, ranks: "Ranks") -> "Reading":
        """How to read images of the model's `image_size`; `margin` is the recipe's, if it has one."""
        from maelstream.pipeline.eval_pass import Reading

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


@dataclass(frozen=True, kw_only=True)
class KnnOptions(EvaluationOptions):
    """How neighbours vote, and which features they are found in."""

    k: int = 20
    """Number of neighbours that vote."""
    temperature: float = 0.07
    """A neighbour's vote is exp(cosine / temperature)."""
    pool: Pool = "class_token"
    """Features after the final norm: the class token, or the mean of the patch tokens."""
    image_size: int | None = None
    """Side of the square input in pixels; the size used in pre-training if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or self.temperature <= 0:
            raise RecipeError(f"--k {self.k} must be at least 1, --temperature {self.temperature} must be positive")

    def check_count(self, train: Dataset) -> None:
        """Raises RecipeError if the training set has fewer than `k` images."""
        if self.k > len(train):
            raise RecipeError(f"--k {self.k}: {train.folder} has {len(train)} images")
