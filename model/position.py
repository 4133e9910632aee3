"""Position tables: fixed 2-D sine-cosine tables, and interpolation of trained tables to another grid.

The paper uses sines and cosines (appendix A.1; Vaswani et al. 2017, section 3.5, in two dimensions). The first half of
the channels encodes the column of a patch, the second half its row. Each half has all sines, then all cosines, at
wavelengths from 2 pi to 10,000 x 2 pi in geometric progression.
"""

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor
from torch.nn import functional as F


def sincos_table(grid: tuple[int, int], dim: int) -> Float32[Tensor, "1 1+l dim"]:
    """Table for a `grid` (rows, columns) of patches in row-major order; the first row, for the class token, is zero.

    Computed in float64 on the CPU and rounded once, so all devices have exactly the published tables.

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
    """Interpolate a table of `old_grid` (rows, columns) to `new_grid`: bicubic, `align_corners=False`.

    The row of the class token stays unchanged. The reference does this with trained tables, before fine-tuning at
    another image size; a sine-cosine table can be computed for any grid. The dtype is that of `table`; if both grids
    are equal, `table` itself is returned.

    Raises:
        ValueError: `table` does not have the size of `old_grid`.
    """
    rows, columns = old_grid
    if table.ndim != 3 or table.shape[:2] != (1, 1 + rows * columns):
        raise ValueError(
            f"position table of shape {tuple(table.shape)} does not fit {rows} x {columns} patches and a class token"
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
