"""Position tables: equal to the reference for square grids, and by the same rule for others."""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from maelstream.model.config import MAEConfig
from maelstream.model.mae import position_tables
from maelstream.model.position import interpolate_table, sincos_table

Golden = Callable[[str], Mapping[str, np.ndarray]]


def test_position_tables_equal_the_reference(golden: Golden) -> None:
    for name, rows in golden("pos_embed").items():
        grid, dim = map(int, re.findall(r"\d+", name))
        table = sincos_table((grid, grid), dim)
        assert table.dtype == torch.float32
        assert table.shape == (1, 1 + grid * grid, dim)
        assert np.array_equal(table[0, :: max(1, grid // 4)], rows)


def test_position_tables_equal_the_reference_in_all_rows(golden: Golden) -> None:
    vectors = golden("f64/pos_embed")
    tables = json.loads(str(vectors["meta_json"]))
    for name in (name for name in tables if name.startswith("g")):
        grid, dim = map(int, re.findall(r"\d+", name))
        table = sincos_table((grid, grid), dim)[0].numpy()
        same_libm = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == tables[name]["sha256_f32"]
        np.testing.assert_allclose(table[vectors[f"{name}_rows"]], vectors[f"{name}_val"], rtol=0, atol=1e-7)
        np.testing.assert_allclose(table.astype(np.float64).sum(0), vectors[f"{name}_colsum"], rtol=0, atol=1e-5)
        assert same_libm or np.abs(table.astype(np.float64).sum() - tables[name]["sum_f64"]) < 1e-3
    np.testing.assert_allclose(sincos_table((4, 4), 64)[0], vectors["g4_d64_full"], rtol=0, atol=1e-7)


def test_a_rectangular_table_is_a_part_of_a_square_one() -> None:
    square = sincos_table((8, 8), 32)[0, 1:].reshape(8, 8, 32)
    assert torch.equal(sincos_table((3, 8), 32)[0, 1:].reshape(3, 8, 32), square[:3])
    assert torch.equal(sincos_table((8, 5), 32)[0, 1:].reshape(8, 5, 32), square[:, :5])


def test_the_first_half_encodes_the_column_and_the_second_the_row() -> None:
    table = sincos_table((3, 5), 16)[0, 1:].reshape(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert not torch.equal(table[:, 0, :8], table[:, 4, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    assert not torch.equal(table[0, :, 8:], table[2, :, 8:])
    assert table[1, 3, 0] == np.float32(np.sin(3.0))
    assert table[1, 3, 12] == np.float32(np.cos(1.0))


def test_the_class_token_has_a_zero_row() -> None:
    assert not sincos_table((4, 4), 32)[0, 0].any()


def test_both_tables_of_a_model_have_their_checkpoint_keys() -> None:
    tables = position_tables(MAEConfig(image_size=(96, 160)))
    assert {name: tuple(table.shape) for name, table in tables.items()} == {
        "pos_embed": (1, 61, 768),
        "decoder_pos_embed": (1, 61, 512),
    }


def test_a_width_that_is_not_divisible_by_4_raises() -> None:
    with pytest.raises(ValueError, match="30 is not divisible by 4"):
        sincos_table((4, 4), 30)


@pytest.mark.parametrize(("old", "new", "dim", "every"), [(4, 6, 64, 1), (14, 24, 192, 97)])
def test_an_interpolated_table_equals_the_reference(golden: Golden, old: int, new: int, dim: int, every: int) -> None:
    drawn = np.random.RandomState(zlib.crc32(f"interp{old}_{new}".encode())).standard_normal((1, 1 + old * old, dim))
    table = torch.from_numpy(drawn.astype(np.float32))
    actual = interpolate_table(table, (old, old), (new, new))
    expected = golden("f64/pos_embed")[f"interp_{old}_{new}_d{dim}"]
    assert actual.shape == (1, 1 + new * new, dim)
    assert np.array_equal(actual[:, ::every], expected)
    assert torch.equal(actual[:, 0], table[:, 0])


def test_a_table_is_interpolated_along_each_side_separately() -> None:
    rows, columns = torch.arange(8.0), torch.arange(6.0)
    patches = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=2).reshape(1, 48, 2)  # (row, column)
    table = torch.cat([torch.full((1, 1, 2), 7.0), patches], dim=1)
    taller = interpolate_table(table, (8, 6), (16, 6))
    assert torch.equal(taller[0, 0], table[0, 0])
    grid = taller[0, 1:].reshape(16, 6, 2)
    assert torch.allclose(grid[..., 1], columns.expand(16, 6), atol=1e-6)
    # Two new rows lie symmetrically around each old row.
    middle = grid[4:12, :, 0].unflatten(0, (4, 2)).mean(1)
    assert torch.allclose(middle, rows[2:6, None].expand(4, 6), atol=1e-5)


def test_equal_grids_return_the_same_table_and_a_wrong_grid_raises() -> None:
    table = sincos_table((4, 6), 8)
    assert interpolate_table(table, (4, 6), (4, 6)) is table
    with pytest.raises(ValueError, match=r"shape \(1, 25, 8\) does not fit 5 x 5 patches"):
        interpolate_table(table, (5, 5), (8, 8))
