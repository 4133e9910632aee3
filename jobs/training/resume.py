"""Finds the checkpoint that a start resumes from: the newest whose state and tensors fit the model and the data.

A checkpoint can be intact, byte for byte as its manifest says, and still not fit: edited together with its manifest, or
copied from another run. Then the next older one is used.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from maelstream.jobs.checkpointing.store import CheckpointError, CheckpointStore, State, put_aside
from maelstream.jobs.distributed.ranks import ControlGroup
from maelstream.pipeline.loader import ImageLoader
from maelstream.shards.errors import MaelstreamError

if TYPE_CHECKING:
    from maelstream.jobs.training.trainer import Objective

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that fits, and the model with its weights."""

    step: int
    state: State
    model: nn.Module


def trained_shapes(model: nn.Module) -> Shapes:
    """Shapes by name of the parameters that the optimizer holds; call it before ZeRO 3 partitions them."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_tensors(objective: "Objective") -> dict[str, Tensor]:
    """Tensors that a checkpoint keeps in addition to the trained ones."""
    return {} if objective.evaluator is None else objective.evaluator.frozen_tensors()


def newest_fitting(
    objective: "Objective", loader: ImageLoader, store: CheckpointStore, newest: int, ema: bool, control: ControlGroup
) -> tuple[Resumed | None, list[str]]:
    """Opens the checkpoint of step `newest`, or the newest older one that fits, and moves `loader` to its position.

    Returns None for step 0, and messages about those that do not fit; these are renamed to `.bad`. All ranks call it.

    Raises:
        CheckpointError: none fits, and none is renamed; or it was trained on another dataset.
    """
    step = newest
    misfits: list[int] = []
    messages: list[str] = []
    while step:
        resumed, fault = _open(objective, loader, store, step, ema)
        faults = control.all_texts(fault)
        if resumed is not None and not any(faults):
            if control.ranks.rank == 0:
                for misfit in misfits:
                    put_aside(store.at(misfit))
            return resumed, [f"{message}; resuming from {store.at(step).name}" for message in messages]
        misfits.append(step)
        messages.append(f"{store.at(step)}: {next(filter(None, faults))}")
        step, _ = store.newest_good(control, below=step)
    if messages:
        raise CheckpointError(
            f"{'; '.join(messages)}; no older checkpoint fits: restore one, or give another --run to start from step 0"
        )
    return None, []


def _open(
    objective: "Objective", loader: ImageLoader, store: CheckpointStore, step: int, ema: bool
) -> tuple[Resumed | None, str]:
    """The checkpoint of `step`, or the reason why it does not fit."""
    from safetensors import SafetensorError

    try:
        state = store.state(step, loader.dataset.fingerprint)
        loader.load_state_dict(state["loader"])
        model = objective.build_model(store.weights(step))
    except CheckpointError:
        raise
    except (ValueError, OSError, SafetensorError, MaelstreamError) as error:
        return None, " ".join(str(error).split())
    except RuntimeError as error:
        if "loading state_dict" not in str(error):  # not enough memory is no fault of the checkpoint
            raise
        return None, " ".join(str(error).split())[:300]
    frozen: Shapes = {name: tuple(tensor.shape) for name, tensor in frozen_tensors(objective).items()}
    fault = store.tensor_fault(step, trained_shapes(model), frozen, ema)
    return (None, fault) if fault else (Resumed(step, state, model), "")
