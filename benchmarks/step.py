"""Training-step rate of the MAE (B/16 by default) by attention and compiler, beside Hugging Face's ViTMAE.

Forward, backward and AdamW under bf16 autocast, on CUDA where there is one; `--precision float32` is for a CPU that
only emulates bf16 (one without AVX-512). The candidates take turns, round by round, so that a machine that slows
down slows all of them; the median round counts.

    python benchmarks/step.py --batch 8 --threads 2
"""

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from model.flops import training_flops
from model.mae import MAE, MAEConfig
from model.optimise import weight_decay_groups
from model.patches import normalise

MEAN, STD = MAEConfig().mean, MAEConfig().std


def training_step(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], bf16: bool
) -> Callable[[Tensor, Tensor], float]:
    """One step of `model` as a function of images and keys; returns the loss, so that the device has finished."""
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.05), lr=1e-6, betas=(0.9, 0.95), fused=True)

    def step(images: Tensor, keys: Tensor) -> float:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(images, keys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def hugging_face(device: torch.device, bf16: bool) -> Callable[[Tensor, Tensor], float]:
    """ViTMAEForPreTraining of the same size and target; its tables start at zero, so only its speed counts."""
    import transformers

    config = transformers.ViTMAEConfig(norm_pix_loss=True, layer_norm_eps=1e-6, attn_implementation="sdpa")
    model = transformers.ViTMAEForPreTraining(config).to(device)
    return training_step(model, lambda images, keys: model(normalise(images, MEAN, STD)).loss, bf16)


def candidates(device: torch.device, bf16: bool) -> dict[str, Callable[[Tensor, Tensor], float]]:
    """Name -> step of everything that can run here."""
    math, sdpa = (MAE(MAEConfig(attention=kind)).to(device) for kind in ("math", "sdpa"))
    compiled = MAE(MAEConfig()).to(device)
    steps = {
        "ours, math": training_step(math, math, bf16),
        "ours, sdpa": training_step(sdpa, sdpa, bf16),
        "ours, auto + torch.compile": training_step(compiled, torch.compile(compiled, fullgraph=True), bf16),
    }
    if importlib.util.find_spec("transformers"):
        steps["Hugging Face ViTMAE, sdpa"] = hugging_face(device, bf16)
    return steps


def measure(device: torch.device, bf16: bool, batch: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds per step (median of `rounds`) and loss of the first step, by candidate."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, generator=generator).to(device)
    keys = torch.arange(batch, device=device)
    steps = candidates(device, bf16)
    first = {name: step(images, keys) for name, step in steps.items()}  # warms up, and compiles: minutes on a CPU
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step(images, keys)
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), first[name]) for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["bf16", "float32"], default="bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {args.threads} threads"
    )
    measured = measure(device, args.precision == "bf16", args.batch, args.rounds)
    reference = measured["ours, math"][0]
    print(f"MAE B/16, batch {args.batch}, {args.precision}, {name}")
    print(f"torch {torch.__version__}, timm {timm.__version__}\n")
    print("| step | images/s | ratio to ours, math | TFLOP/s | first loss |\n|---|---|---|---|---|")
    for step, (seconds, loss) in measured.items():
        rate = args.batch / seconds
        tflops = rate * training_flops(MAEConfig()) / 1e12
        print(f"| {step} | {rate:.2f} | {reference / seconds:.2f} | {tflops:.2f} | {loss:.4f} |")
    if not importlib.util.find_spec("transformers"):
        print("| Hugging Face ViTMAE, sdpa | not installed | | | |")


if __name__ == "__main__":
    main()
