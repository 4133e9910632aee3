"""Model configuration: invalid values raise errors of one line."""

from typing import Any

import pytest

from maelstream.model.config import MAEConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (224, 220)}, "not divisible by patch_size 16"),
        ({"heads": 5}, "heads 5 does not divide dim 768"),
        ({"decoder_heads": 7}, "decoder_heads 7 does not divide decoder_dim 512"),
        ({"dim": 30, "heads": 3}, "dim 30 is not divisible by 4"),
        ({"decoder_dim": 30, "decoder_heads": 3}, "decoder_dim 30 is not divisible by 4"),
        ({"mlp_ratio": 0.3}, "not a whole number"),
        ({"mask_ratio": 1.0}, r"not in \[0, 1\)"),
        ({"mask": "stripes"}, "mask 'stripes' is not one of random, block, grid"),
        ({"mask": "grid", "image_size": (224, 240)}, "14 x 15 patches have an odd side"),
        ({"mask": "grid", "mask_ratio": 0.5}, "keeps a quarter of 196 patches, not 98; set mask_ratio to 0.75"),
        ({"mask_ratio": -0.1}, r"not in \[0, 1\)"),
        ({"mask_ratio": float("nan")}, r"not in \[0, 1\)"),
        ({"image_size": (32, 32), "mask_ratio": 0.8}, "leaves no patch visible"),
        ({"in_chans": 1}, "in_chans = 1 values each"),
        ({"std": (0.2, 0.0, 0.2)}, "must be positive"),
        ({"depth": 0}, "at least 1"),
        ({"target": "colour"}, "target 'colour' is not one of pixel, normalised_pixel"),
        ({"attention": "flash"}, "attention 'flash' is not one of auto, sdpa, math"),
        ({"patch_size": 1, "in_chans": 1, "mean": (0.5,), "std": (0.5,)}, "has no spread"),
    ],
)
def test_invalid_values_raise_an_error_of_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MAEConfig(**options)
    assert "\n" not in str(caught.value)
