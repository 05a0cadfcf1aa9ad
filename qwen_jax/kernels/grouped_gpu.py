"""`kernels.grouped` for NVIDIA GPUs through Pallas and Triton.

A program multiplies a block of rows of one group by a block of columns of that group's matrix.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from qwen_jax.backend import current_backend
from qwen_jax.kernels.gpu import dot
from qwen_jax.kernels.row_blocks import block_size, row_blocks

# Columns of a block, and how many of the summed axis are multiplied at a time. float32 runs without the matrix units,
# which would round to TF32, and leaves room for less.
COLUMNS, DEPTH = 128, 64


def fits(shape: tuple[int, ...]) -> bool:
    """Whether weights [E, out, in] can be cut into blocks of at least 16, the least that a matrix unit takes."""
    return all(size % 16 == 0 for size in shape[1:])


def grouped_matmul(
    rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, dtype: DTypeLike, *, transposed: bool = False
) -> jax.Array:
    """As `kernels.grouped.grouped_matmul`; transposed: weight is [E, in, out]. Rows beyond the groups are left."""
    num_rows, depth = rows.shape
    wide = rows.dtype == jnp.float32
    columns = weight.shape[2 if transposed else 1]
    size = block_size(num_rows, len(group_sizes), 16, 32 if wide else 128)
    blocks = row_blocks(num_rows, group_sizes, size)
    tile = (size, math.gcd(columns, 32 if wide else COLUMNS), math.gcd(depth, 16 if wide else DEPTH))
    scalars = jnp.stack([blocks.group, blocks.start, blocks.count], axis=1)  # [n, 3]

    def kernel(scalars: Any, rows_ref: Any, weight_ref: Any, out_ref: Any) -> None:
        column = pl.program_id(1) * tile[1]
        group, start, count = (triton.load(scalars.at[pl.program_id(0), jnp.int32(i)]) for i in range(3))
        is_row = (jnp.arange(tile[0]) < count)[:, None]

        @pl.when(count > 0)
        def _() -> None:
            def step(i: Any, total: jax.Array) -> jax.Array:
                at = pl.ds(i * tile[2], tile[2])
                x = triton.load(rows_ref.at[pl.ds(start, tile[0]), at], mask=is_row, other=0)
                if transposed:
                    return total + dot(x, triton.load(weight_ref.at[group, at, pl.ds(column, tile[1])]), 1, 0)
                return total + dot(x, triton.load(weight_ref.at[group, pl.ds(column, tile[1]), at]), 1, 1)

            total = lax.fori_loop(0, depth // tile[2], step, jnp.zeros(tile[:2], jnp.float32))
            here = out_ref.at[pl.ds(start, tile[0]), pl.ds(column, tile[1])]
            triton.store(here, total.astype(out_ref.dtype), mask=is_row)

    return pl.pallas_call(
        kernel,
        grid=(len(scalars), columns // tile[1]),
        out_shape=jax.ShapeDtypeStruct((num_rows, columns), dtype),
        compiler_params=triton.CompilerParams(num_warps=8 if size == 128 else 4, num_stages=3),
        interpret=current_backend().interpret,
        name="grouped_matmul",
    )(scalars, rows, weight)


def grouped_gradient(rows: jax.Array, d_out: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The gradient of `grouped_matmul` to its weight, [E, out, in] in `dtype`; rows [N, in], d_out [N, out]."""
    wide = rows.dtype == jnp.float32
    side, depth = (32, 16) if wide else (COLUMNS, DEPTH)
    tile = (math.gcd(d_out.shape[1], side), math.gcd(rows.shape[1], side))
    bounds = jnp.stack([jnp.cumsum(group_sizes) - group_sizes, group_sizes], axis=1)  # [E, 2]

    def kernel(bounds: Any, rows_ref: Any, d_out_ref: Any, out_ref: Any) -> None:
        group, out, column = pl.program_id(0), pl.program_id(1) * tile[0], pl.program_id(2) * tile[1]
        start, count = (triton.load(bounds.at[group, jnp.int32(i)]) for i in range(2))

        def step(i: Any, total: jax.Array) -> jax.Array:
            is_row = (i * depth + jnp.arange(depth) < count)[:, None]
            at = pl.ds(start + i * depth, depth)
            dy = triton.load(d_out_ref.at[at, pl.ds(out, tile[0])], mask=is_row, other=0)
            x = triton.load(rows_ref.at[at, pl.ds(column, tile[1])], mask=is_row, other=0)
            return total + dot(dy, x, 0, 0)

        total = lax.fori_loop(0, (count + depth - 1) // depth, step, jnp.zeros(tile, jnp.float32))
        triton.store(out_ref.at[group, pl.ds(out, tile[0]), pl.ds(column, tile[1])], total.astype(out_ref.dtype))

    return pl.pallas_call(
        kernel,
        grid=(len(group_sizes), d_out.shape[1] // tile[0], rows.shape[1] // tile[1]),
        out_shape=jax.ShapeDtypeStruct((len(group_sizes), d_out.shape[1], rows.shape[1]), dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=current_backend().interpret,
        name="grouped_gradient",
    )(bounds.astype(jnp.int32), rows, d_out)
