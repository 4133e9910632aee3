"""Cost of a training step, compared with Hugging Face's ViTMAE, with matrix products alone, and with the paper.

    python -m benchmarks.step [--json FILE]                    # parts step, paper and memory; minutes on two cores
    python -m benchmarks.step --parts step --batch 8           # one part

step    B/16, forward + backward + AdamW: this model by attention kernel and compiler, ViTMAEForPreTraining (sdpa, train
        mode, the same optimizer and uint8 batch), and the matrix products of our step alone, one after the other on
        operands with the same shapes, strides and dtype.
paper   L/16, the whole step: an encoder with mask tokens, one without, and one without whose decoder has 1 block
        instead of 8 (table 2 has 2.8x and 3.7x). The three models share their weights, so they fit in memory.
memory  Bytes that each image adds at the peak of forward + backward, with and without activation checkpointing
        (benchmarks/activation_memory.py).
emulated (only with `--parts emulated`)  For a CPU without bf16 instructions: Hugging Face in bf16 autocast, and our
        engine with a bf16 recipe, which keeps parameters in bf16 and multiplies in float32.

Candidates take turns in each round, so that a machine that slows down slows all of them. Results are medians.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.activation_memory import bytes_per_image
from maelstream.jobs.hardware import multiplies_bf16, process_device
from maelstream.jobs.profiling.table2_times import build_shared_models
from maelstream.model.config import MAEConfig
from maelstream.model.flops import training_flops
from maelstream.model.mae import MAE
from maelstream.model.optimise import weight_decay_groups
from maelstream.model.patches import normalise
from maelstream.model.sizes import VIT_H14, VIT_L16
from maelstream.model.transformer import choose_attention

BASE, LARGE, HUGE = MAEConfig(), MAEConfig(**VIT_L16._asdict()), MAEConfig(**VIT_H14._asdict())

Step = Callable[[Tensor, Tensor], None]


def adamw(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True)


def training_step(loss_of: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer, bf16: bool) -> Step:
    """A training step as a function of images and keys."""

    def step(images: Tensor, keys: Tensor) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(images, keys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face(device: torch.device, bf16: bool) -> Step:
    """A step of ViTMAEForPreTraining of the same size and target. Its position tables are zero: only speed counts."""
    import transformers

    config = transformers.ViTMAEConfig(norm_pix_loss=True, layer_norm_eps=1e-6, attn_implementation="sdpa")
    model = transformers.ViTMAEForPreTraining(config).to(device).train()
    optimizer = adamw(weight_decay_groups(model, 0.05))
    return training_step(lambda images, keys: model(normalise(images, BASE.mean, BASE.std)).loss, optimizer, bf16)


class Products(TorchDispatchMode):
    """Records the matrix products that run inside this context, with size and stride of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, list[tuple[torch.Size, tuple[int, ...]]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        if func in products:
            self.seen.append((func, [(each.shape, each.stride()) for each in args]))
        return func(*args, **(kwargs or {}))


def bare_products(batch: int, device: torch.device, bf16: bool) -> Step:
    """The matrix products of one step, including those of attention, and nothing else."""
    with torch.device("meta"):
        model = MAE(dataclasses.replace(BASE, attention="math"))
        images, keys = torch.empty(batch, 3, 224, 224, dtype=torch.uint8), torch.empty(batch, dtype=torch.int64)
    with Products() as products:
        model(images, keys).backward()
    dtype = torch.bfloat16 if bf16 else torch.float32
    operands: dict[Any, Tensor] = {}
    for key in (key for _, keys in products.seen for key in keys):
        if key not in operands:
            operands[key] = torch.empty_strided(*key, dtype=dtype, device=device).normal_()
    calls = [(func, [operands[key] for key in keys]) for func, keys in products.seen]

    def step(images: Tensor, keys: Tensor) -> None:
        for func, arguments in calls:
            func(*arguments)

    return step


def steps_of_base(batch: int, device: torch.device, bf16: bool) -> dict[str, Step]:
    """The steps that can run on this machine, by name; all of ours share one model and one optimizer."""
    model = MAE(BASE).to(device)
    optimizer = adamw(weight_decay_groups(model, 0.05))
    compiled = torch.compile(model, fullgraph=True)
    best = "math" if device.type == "cpu" and bf16 else "sdpa"

    def ours(loss_of: Callable[[Tensor, Tensor], Tensor], attention: Any) -> Step:
        step = training_step(loss_of, optimizer, bf16)

        def with_attention(images: Tensor, keys: Tensor) -> None:
            choose_attention(model, attention, device)
            step(images, keys)

        return with_attention

    steps = {
        "ours, math": ours(model, "math"),
        "ours, sdpa": ours(model, "sdpa"),
        f"ours, {best}, compiled": ours(compiled, best),
        "its products alone": bare_products(batch, device, bf16),
    }
    if importlib.util.find_spec("transformers"):
        try:
            steps["Hugging Face, sdpa"] = hugging_face(device, bf16)
        except Exception as error:
            print(f"Hugging Face: failed, {type(error).__name__}: {str(error).splitlines()[0]}\n")
    return steps


def steps_of_large(device: torch.device, bf16: bool) -> dict[str, Step]:
    """The three models of the paper's table 2, with shared parameters."""
    models, optimizer = build_shared_models(LARGE, device)
    return {name: training_step(model, optimizer, bf16) for name, model in models.items()}


def seconds_of(steps: dict[str, Step], batch: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each step, without the first two rounds, which compile and fill memory pools."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, generator=generator).to(device)
    keys = torch.arange(batch, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step(images, keys)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def part_step(batch: int, device: torch.device, bf16: bool, rounds: int) -> dict[str, float]:
    seconds = seconds_of(steps_of_base(batch, device, bf16), batch, device, rounds)
    print(f"B/16, batch {batch}, forward + backward + AdamW\n")
    print("| step | seconds | images/s | TFLOP/s |\n|---|---|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {each:.3f} | {batch / each:.2f} | {batch * training_flops(BASE) / each / 1e12:.3f} |")
    best = min((name for name in seconds if name.startswith("ours")), key=seconds.__getitem__)
    result = {f"seconds, {name}": each for name, each in seconds.items()}
    result["best over its products alone"] = seconds[best] / seconds["its products alone"]
    print(f"\n{best} over its products alone: {result['best over its products alone']:.2f} (target: at most 1.4)")
    if "Hugging Face, sdpa" in seconds:
        theirs = seconds["Hugging Face, sdpa"]
        result |= {
            "Hugging Face over best": theirs / seconds[best],
            "Hugging Face over the products alone": theirs / seconds["its products alone"],
        }
        print(f"Hugging Face over {best}: {result['Hugging Face over best']:.2f} (target: at least 1.3)")
        print(f"Hugging Face over the products alone: {result['Hugging Face over the products alone']:.2f}")
    else:
        print("Hugging Face: not measured, because transformers is not installed or failed (see above)")
    return result


def part_emulated(batch: int, device: torch.device, rounds: int) -> dict[str, float]:
    model = MAE(BASE).to(device, torch.bfloat16)
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    optimizer = adamw([{"params": masters, "weight_decay": 0.05}])

    def widened(images: Tensor, keys: Tensor) -> Tensor:
        for parameter, master in zip(model.parameters(), masters, strict=True):
            parameter.data.copy_(master)
        return functional_call(model, dict(zip(names, masters, strict=True)), (images, keys))

    steps = {"ours, as the engine runs it": training_step(widened, optimizer, False)}
    steps["Hugging Face, bf16 autocast"] = hugging_face(device, True)
    seconds = seconds_of(steps, batch, device, rounds)
    print(f"B/16, batch {batch}, bf16 recipe\n\n| step | seconds | images/s |\n|---|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {each:.2f} | {batch / each:.3f} |")
    ratio = seconds["Hugging Face, bf16 autocast"] / seconds["ours, as the engine runs it"]
    print(f"\nHugging Face over ours: {ratio:.1f}")
    return {f"seconds, {name}": each for name, each in seconds.items()} | {"Hugging Face over ours": ratio}


def part_paper(batch: int, device: torch.device, bf16: bool, rounds: int) -> dict[str, float]:
    seconds = seconds_of(steps_of_large(device, bf16), batch, device, rounds)
    slowest = next(iter(seconds.values()))
    print(
        f"L/16, batch {batch}, forward + backward + AdamW\n\n| model | seconds | faster by | paper |\n|---|---|---|---|"
    )
    for (name, each), paper in zip(seconds.items(), ("1", "2.8", "3.7"), strict=True):
        print(f"| {name} | {each:.2f} | {slowest / each:.2f} | {paper} |")
    return {f"seconds, {name}": each for name, each in seconds.items()} | {
        f"faster by, {name}": slowest / each for name, each in seconds.items()
    }


def part_memory(device: torch.device, bf16: bool) -> dict[str, float]:
    result: dict[str, float] = {}
    print("| model | MB per image | with activation checkpointing | ratio |\n|---|---|---|---|")
    for name, config in {"B/16": BASE, "L/16": LARGE, "H/14": HUGE}.items():
        whole, saved = (bytes_per_image(config, checkpointing, device, bf16) / 1e6 for checkpointing in (False, True))
        gc.collect()
        print(f"| {name} | {whole:.1f} | {saved:.1f} | {whole / saved:.1f} |", flush=True)
        result |= {f"MB an image, {name}": whole, f"MB an image, {name}, checkpointing": saved}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["step", "paper", "memory", "emulated"], default=["step", "paper", "memory"]
    )
    parser.add_argument("--batch", type=int, default=8, help="batch size of part step")
    parser.add_argument("--paper-batch", type=int, default=8, help="batch size of part paper")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto")
    parser.add_argument("--json", type=Path, help="file to which all figures are written as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = process_device()
    fast_bf16 = multiplies_bf16(device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and fast_bf16)
    machine = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {args.threads} threads"
    )
    precision = "bf16 autocast" if bf16 else "float32" + ("" if fast_bf16 else " (no bf16 instructions)")
    print(f"{machine}, {precision}, torch {torch.__version__}, timm {timm.__version__}")
    figures: dict[str, Any] = {"machine": machine, "precision": precision, "batch": args.batch}
    for part in args.parts:
        print()
        if part == "step":
            figures[part] = part_step(args.batch, device, bf16, args.rounds)
        elif part == "paper":
            figures[part] = part_paper(args.paper_batch, device, bf16, args.rounds)
        elif part == "emulated":
            figures[part] = part_emulated(args.batch, device, args.rounds)
        else:
            figures[part] = part_memory(device, bf16)
        gc.collect()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
