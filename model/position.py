"""Position tables: the fixed 2-D sine-cosine ones, and a trained one for another grid.

Sine and cosine are the paper's (appendix A.1; Vaswani et al. 2017, section 3.5, in two dimensions).

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
) -> Float[Tensor, "1 1+l2 d"]:
    """A table of `old_grid` (rows, columns) for `new_grid`: bicubic, corners not aligned, class row as it is.

    For trained tables, as the reference does before fine-tuning at another size; a sine-cosine table of any grid is
    better computed. In the dtype of `table`; equal grids give `table` itself.

    Raises:
        ValueError: `table` is not one of `old_grid`.
    """
    rows, columns = old_grid
    if table.ndim != 3 or table.shape[:2] != (1, 1 + rows * columns):
        raise ValueError(
            f"position table of shape {tuple(table.shape)} is not one of {rows} x {columns} patches and a class token"
        )
    if old_grid == new_grid:
        return table
    patches = table[:, 1:].unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, D, gh, gw)
    resized = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)  # (1, D, gh2, gw2)
    return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)  # (1, 1+L2, D)


def _waves(positions: Float64[Tensor, "l"], dim: int) -> Float64[Tensor, "l dim"]:
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))  # (dim/2,)
    angles = positions[:, None] * frequencies  # (L, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
