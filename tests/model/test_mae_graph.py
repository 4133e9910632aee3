"""The masked autoencoder under torch.compile, with activation checkpointing, and without host synchronisation."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maelstream.model import masking
from maelstream.model.mae import MAE
from tests.helpers.tiny_mae import TINY, batch, tiny

GRAPHS = {
    "default": {},
    "block mask": {"mask": "block"},
    "grid mask": {"mask": "grid"},
    "encoder mask tokens": {"encoder_mask_tokens": True},
    "pixel target": {"target": "pixel"},
}


@pytest.mark.parametrize("options", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_normalisation_mask_forward_and_loss_are_one_graph(options: dict[str, Any], checkpointing: bool) -> None:
    model = tiny(**options)
    model.activation_checkpointing = checkpointing
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(*batch(model.config))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_step_equals_the_eager_one_and_compiles_once(checkpointing: bool) -> None:
    images, keys = batch(TINY)
    model, eager = tiny(), tiny()
    model.activation_checkpointing = checkpointing
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for each in (keys, keys + 1, keys * 3):  # other masks have other values but the same shapes
        model.zero_grad()
        eager.zero_grad()
        loss, expected = compiled(images, each), eager(images, each)
        loss.backward()
        expected.backward()
        assert torch.allclose(loss, expected, rtol=1e-5)
        for parameter, expected_parameter in zip(model.parameters(), eager.parameters(), strict=True):
            assert parameter.grad is not None and expected_parameter.grad is not None
            assert torch.allclose(parameter.grad, expected_parameter.grad, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("options", GRAPHS.values(), ids=GRAPHS)
def test_activation_checkpointing_is_bit_identical(options: dict[str, Any]) -> None:
    plain, checkpointed = tiny(**options), tiny(**options)
    checkpointed.activation_checkpointing = True
    images, keys = batch(plain.config)
    losses = [model(images, keys) for model in (plain, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for parameter, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        assert torch.equal(parameter.grad, other.grad)


def test_activation_checkpointing_keeps_one_tensor_per_block() -> None:
    def kept_bytes(model: MAE) -> int:
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            keep_alive = model(*batch(TINY, 8))
        assert keep_alive.requires_grad
        return sum(storages.values())

    model = tiny(depth=6)
    without_checkpointing = kept_bytes(model)
    model.activation_checkpointing = True
    assert kept_bytes(model) < without_checkpointing / 3


class HostSync(Exception):
    """Raised by `NoHostSync` for an operator that synchronises host and device."""


class NoHostSync(TorchDispatchMode):
    """Raises for operators that read values back, copy from the host, or have shapes that depend on values."""

    # `lift_fresh` is torch.tensor(...), a constant that would be copied to the device at every step.
    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        tensors = [each for each in torch.utils._pytree.tree_leaves(args) if isinstance(each, torch.Tensor)]
        indexed = name in ("index", "index_put_") and any(each.dtype == torch.bool for each in tensors)
        if name in self.FORBIDDEN or indexed or (kwargs or {}).get("device") not in (None, torch.device("cpu")):
            raise HostSync(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", GRAPHS.values(), ids=GRAPHS)
def test_a_step_never_waits_for_the_device(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "_hash_scores",
        "_block_scores",
        "_grid_scores",
    ):  # the mode sees operators inside functions, but not inside custom operators
        monkeypatch.setattr(masking, name, getattr(masking, name)._init_fn)
    model = tiny(**options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with NoHostSync():
        model(*batch(model.config)).backward()
        optimizer.step()
    for sync in (torch.Tensor.item, torch.Tensor.nonzero, lambda loss: loss[loss > 0], lambda loss: torch.tensor(1.0)):
        with NoHostSync(), pytest.raises(HostSync):
            sync(torch.ones(()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", GRAPHS.values(), ids=GRAPHS)
def test_a_step_on_the_gpu_never_waits_for_the_device(options: dict[str, Any]) -> None:
    model = tiny(**options).cuda()
    images, keys = (tensor.cuda() for tensor in batch(model.config))
    model(images, keys).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(images, keys).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
