"""`maelstream fit-tokenizer DST --out FILE`: train a discrete VAE on a dataset, for the target "token"."""

from maelstream.jobs.arguments import check_output_file, parse_arguments
from maelstream.jobs.recipe import RecipeError
from maelstream.jobs.weights.tokenizer_options import FitTokenizer
from maelstream.shards.dataset import Dataset


def main(args: list[str]) -> int:
    """`maelstream fit-tokenizer`."""
    command = parse_arguments(FitTokenizer, args, "fit-tokenizer")
    if min(command.steps, command.batch_size, command.log_every, command.threads) < 1 or command.lr <= 0:
        raise RecipeError("--steps, --batch-size, --log-every and --threads must be at least 1, and --lr above 0")
    if command.out.suffix != ".safetensors":
        raise RecipeError(f"--out {command.out}: the file name must end in .safetensors")
    check_output_file("--out", command.out)
    dataset = Dataset.open(command.dst)
    from maelstream.jobs.weights.tokenizer_fitting import fit  # imports torch and DALI

    fit(command, dataset)
    return 0
