"""The masked autoencoder in a file of weights without a run, such as a published full checkpoint.

Sizes follow from shapes, and what shapes do not show from a configuration next to the file or from the user. The rest
is assumed, and said.
"""

from typing import Any

import torch

from maelstream.jobs.weights.reading import StoredWeights, WeightsError, check_has_decoder, encoder_values, mae_weights
from maelstream.jobs.weights.tensor_files import report
from maelstream.model.config import MAEConfig
from maelstream.model.formats import decoder_shape
from maelstream.model.mae import MAE

_FIELDS = ("decoder_heads", "mask_ratio", "mask", "target", "mean", "std")


def stored_mae(stored: StoredWeights, heads: int | None, decoder_heads: int | None, norm_pix: bool) -> MAE:
    """The model in `stored`, float32 on the CPU, without dropout.

    `heads` and `decoder_heads` override what a configuration says or what is usual for the width. `norm_pix` means that
    the decoder predicts normalised pixels; a configuration may say so, too.

    Raises:
        WeightsError: an encoder alone, sizes that do not fit together, or a target other than pixels.
    """
    check_has_decoder(stored)
    try:
        values: dict[str, Any] = encoder_values(stored)["model"] | decoder_shape(stored.tensors)
    except ValueError as error:
        raise WeightsError(f"{stored.file}: {error}; give a full checkpoint") from None
    values |= {name: stored.known[name] for name in _FIELDS if name in stored.known}
    assumed = [] if heads or "heads" in stored.known else [f"{values['heads']} heads (--heads)"]
    if "decoder_heads" not in values:  # the published decoders have 32 channels per head
        values["decoder_heads"] = values["decoder_dim"] // 32 or 1
        assumed += [] if decoder_heads else [f"{values['decoder_heads']} decoder heads (--decoder-heads)"]
    if heads:
        values["heads"] = heads
    if decoder_heads:
        values["decoder_heads"] = decoder_heads
    if norm_pix:
        values["target"] = "normalised_pixel"
    elif "target" not in values:
        values["target"] = "pixel"
        assumed.append("plain pixels as target, as in the published mae_visualize_* (else --norm-pix)")
    if values["target"] not in ("pixel", "normalised_pixel"):
        raise WeightsError(f"{stored.file}: the target {values['target']} needs the run's own file; give the run")
    if "image_size" not in values:
        raise WeightsError(f"{stored.file}: its position table has no square grid; give the run, or an export of it")
    try:
        config = MAEConfig(**values)
    except ValueError as error:
        raise WeightsError(f"{stored.file}: {error}; give --heads and --decoder-heads") from None
    if assumed:
        report(f"{stored.file} does not store everything; assumed: {', '.join(assumed)}")
    with torch.device("meta"):
        model = MAE(config)
    model.load_state_dict(mae_weights(stored, config), assign=True)
    return model.float().eval()
