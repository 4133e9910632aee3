"""Fixed 2-D sine-cosine position tables (paper, appendix A.1; Vaswani et al. 2017, section 3.5, in two dimensions).

The first half of the channels encodes the column of a patch, the second half its row. Each half is all sines, then all
cosines, at wavelengths from 2 pi to 10,000 x 2 pi in a geometric row.
"""

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor
from torch.nn import functional as F


def sincos_table(grid: tuple[int, int], dim: int) -> Float32[Tensor, "1 1+l dim"]:
    """Table for `grid` (rows, columns) of patches in row-major order, behind a zero row for the class token.

    Computed in float64 on the CPU and rounded once, so that every device holds the published tables bit for bit.

    Raises:
        ValueError: `dim` is not divisible by 4 (sine and cosine of two coordinates).
    """
    if dim % 4:
        raise ValueError(f"position table: dim {dim} is not divisible by 4 (sine and cosine of row and column)")
    rows, columns = (torch.arange(size, dtype=torch.float64, device="cpu") for size in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")  # (gh, gw)
    patches = torch.cat([_waves(column.flatten(), dim // 2), _waves(row.flatten(), dim // 2)], dim=1)  # (L, D)
    return torch.cat([patches.new_zeros(1, dim), patches])[None].float()  # (1, 1+L, D)


def interpolate_table(
    table: Float[Tensor, "1 1+l d"], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 1+m d"]:
    """A table for another grid (rows, columns): bicubic between the patches' entries, the class token's as it is."""
    rows = table[:, 1:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, gh, gw)
    rows = F.interpolate(rows, new_grid, mode="bicubic", align_corners=False)  # (1, D, new gh, new gw)
    return torch.cat([table[:, :1], rows.flatten(2).transpose(1, 2)], dim=1)  # (1, 1+M, D)


def _waves(positions: Float64[Tensor, "l"], dim: int) -> Float64[Tensor, "l dim"]:
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))  # (dim/2,)
    angles = positions[:, None] * frequencies  # (L, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
