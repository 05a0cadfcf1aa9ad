"""Products of few rows with weights in groups of int4 or int8, for NVIDIA GPUs through Pallas and Triton.

XLA:GPU writes out a float32 sum for every group (or the widened weight); here a group's sum never leaves a program.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.backend import current_backend
from qwen_jax.kernels.gpu import dot

# More rows than these cost more to multiply than a widened weight costs to write.
MOST_ROWS = 64
# Output features of a program, inputs of a step, and the programs that keep an H100's 132 cores reading.
FEATURES, DEPTH, PROGRAMS = 64, 128, 1024
WARPS, STAGES = 4, 3


def fits(num_rows: int, values: jax.Array) -> bool:
    """Whether `product` takes so many rows and values [*out, groups, group]."""
    return (
        num_rows <= MOST_ROWS
        and values.dtype in (jnp.int4, jnp.int8)
        and values.shape[-1] % 32 == 0  # a step of 4 bits has halves of at least 16, the least of a matrix unit
        and math.prod(values.shape[:-2]) % 16 == 0
    )


def product(x: jax.Array, values: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """float32 [N, out] of x [N, in] with (values - zero) * scale of values [*out, groups, group], see `leaves.Grouped`.

    Products are taken in x's dtype; scale and zero are [*out, groups].
    """
    num_rows, num_in = x.shape
    num_groups, group = values.shape[-2:]
    num_out = math.prod(values.shape[:-2])
    features = math.gcd(num_out, FEATURES)
    depth = math.gcd(group, DEPTH)  # of a step, within one group
    packed = values.dtype == jnp.int4
    parts = 2 if packed else 1
    rows = max(16, pl.next_power_of_2(num_rows))
    x = jnp.pad(x, [(0, rows - num_rows), (0, 0)])
    # inputs of even and of odd places, whose weights are the low and the high half of a byte
    x = jnp.moveaxis(x.reshape(rows, num_in // parts, parts), 2, 0)
    if packed:
        values = lax.bitcast_convert_type(values.reshape(num_out, num_in // 2, 2), jnp.uint8)
    values = values.reshape(num_out, num_in // parts)
    of_groups = [scale] if zero is None else [scale, zero.astype(jnp.int8)]
    of_groups = [of.reshape(num_out, num_groups) for of in of_groups]
    steps = num_in // depth
    wanted = pl.cdiv(PROGRAMS, num_out // features)
    splits = max(n for n in range(1, min(wanted, steps) + 1) if steps % n == 0)
    wide = depth // parts

    def kernel(x_ref: Any, values_ref: Any, *refs: Any) -> None:
        *group_refs, out_ref = refs
        first = pl.program_id(1) * (steps // splits)

        def step(i: Any, total: jax.Array) -> jax.Array:
            here = first + i
            at = pl.ds(here * wide, wide)
            codes = triton.load(values_ref.at[:, at]).astype(jnp.int32)
            numbers = [((codes & 15) ^ 8) - 8, ((codes >> 4) ^ 8) - 8] if packed else [codes]
            scale, *zeros = (triton.load(ref.at[:, lax.div(here * depth, jnp.int32(group))]) for ref in group_refs)
            sums = jnp.zeros((rows, features), jnp.float32)
            for part, number in enumerate(numbers):
                if zeros:
                    number = number - zeros[0].astype(jnp.int32)[:, None]
                inputs = triton.load(x_ref.at[jnp.int32(part), :, at])
                sums = sums + dot(inputs, number.astype(inputs.dtype), 1, 1)
            return total + sums * scale.astype(jnp.float32)[None]

        total = lax.fori_loop(0, steps // splits, step, jnp.zeros((rows, features), jnp.float32))
        triton.store(out_ref, total)

    out = pl.pallas_call(
        kernel,
        grid=(num_out // features, splits),
        in_specs=[
            pl.BlockSpec(x.shape, lambda i, s: (0, 0, 0)),
            pl.BlockSpec((features, num_in // parts), lambda i, s: (i, 0)),
            *[pl.BlockSpec((features, num_groups), lambda i, s: (i, 0))] * len(of_groups),
        ],
        out_specs=pl.BlockSpec((None, rows, features), lambda i, s: (s, 0, i)),
        out_shape=jax.ShapeDtypeStruct((splits, rows, num_out), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=current_backend().interpret,
        name="groups_product",
    )(x, values, *of_groups)
    return jnp.sum(out, axis=0)[:num_rows]
