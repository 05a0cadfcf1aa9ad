"""Products in the forms that XLA:CPU makes fast. Each rests on a line of docs/performance.md, named beside it."""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels import plain
from qwen_jax.kernels.row_blocks import block_size, row_blocks
from qwen_jax.kernels.spec import AttentionSpec

Tree = TypeVar("Tree")

# "Weights are stored [out, in] ... and stand left of the product up to 64 rows"
FEW_ROWS = 64
# "A served MLP is a sum of narrower ones": features of one, of which 512 rows fit a core's L2 cache of 2 MiB
PART = 1664


def matmul(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """rows [N, in] times matrix [out, in]: float32 [N, out], the type for which XLA:CPU takes the matrix unit."""
    num_rows = len(rows)
    product = functools.partial(
        lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if num_rows > FEW_ROWS:
        return product(rows, matrix)
    if num_rows == 1 and rows.dtype == jnp.bfloat16:
        # "A single bfloat16 row is multiplied as two equal ones": for one, XLA:CPU converts the whole matrix
        rows = jnp.broadcast_to(rows, (2, rows.shape[1]))
    return product(matrix, rows)[:, :num_rows].T


def cuts(features: int) -> list[slice]:
    """Even parts of at most PART features, of whole 64s."""
    size = -(-features // -(-features // PART) // 64) * 64
    return [slice(start, min(start + size, features)) for start in range(0, features, size)]


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up of float32 arrays.

    silu(g) = g sigmoid(g) = h (1 + tanh h), h = g / 2, within 1e-7 |g|; XLA:CPU is faster at tanh than at exp.
    """
    half = 0.5 * gate
    return half * (1 + jnp.tanh(half)) * up


def grouped_matmul(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """As `kernels.grouped.grouped_matmul`, float32; rows beyond the groups are 0. `weight` may be its `bits`.

    "Experts are read in blocks of rows": one after another, as many as the groups need.
    """
    size = block_size(len(rows), len(group_sizes), 4, FEW_ROWS)
    blocks = row_blocks(len(rows), group_sizes, size)
    padded, weight = jnp.pad(rows, ((0, size), (0, 0))), bits(weight)

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        matrix = lax.dynamic_index_in_dim(weight, blocks.group[i], keepdims=False)
        matrix = matrix if matrix.dtype == rows.dtype else lax.bitcast_convert_type(matrix, rows.dtype)
        y = matmul(matrix, lax.dynamic_slice_in_dim(padded, blocks.start[i], size))
        return lax.dynamic_update_slice_in_dim(out, y, blocks.start[i], 0)  # what is too much, later blocks overwrite

    out = lax.fori_loop(0, blocks.number, block, jnp.zeros((len(padded), weight.shape[1]), jnp.float32))[: len(rows)]
    return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), out, 0.0)


def bits(weight: jax.Array) -> jax.Array:
    """Weights of 16 bits as integers: for XLA:CPU a slice of bfloat16 in a loop is one of all of it in float32."""
    return lax.bitcast_convert_type(weight, jnp.uint16) if weight.dtype.itemsize == 2 else weight


def grouped_gradient(rows: jax.Array, d_out: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The gradient of `grouped_matmul` to its weight, float32 [E, out, in]; rows [N, in], d_out [N, out]."""
    size = block_size(len(rows), len(group_sizes), 4, FEW_ROWS)
    blocks = row_blocks(len(rows), group_sizes, size)
    rows, d_out = (jnp.pad(x, ((0, size), (0, 0))) for x in (rows, d_out))

    def block(i: jax.Array, d_weight: jax.Array) -> jax.Array:
        x, dy = (lax.dynamic_slice_in_dim(whole, blocks.start[i], size) for whole in (rows, d_out))
        dy = jnp.where(jnp.arange(size)[:, None] < blocks.count[i], dy, 0)
        product = lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return d_weight.at[blocks.group[i]].add(product)

    d_weight = jnp.zeros((len(group_sizes), d_out.shape[1], rows.shape[1]), jnp.float32)
    return lax.fori_loop(0, blocks.number, block, d_weight)


def attention_of_one_query(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> plain.Attended:
    """`plain.formula` with T = 1: "A single query stands right of the keys"."""

    def keys_left(q: jax.Array, k: jax.Array) -> jax.Array:
        scores = jnp.einsum("bksh,bkqh->bksq", k, q, preferred_element_type=jnp.float32)
        # without the barrier XLA:CPU turns it round again
        return jnp.swapaxes(lax.optimization_barrier(scores), 2, 3)

    return plain.formula(q, k, v, spec, keys_left)


def kept_in_loop(tree: Tree) -> Tree:
    """Arrays that a loop's body uses: "The embedding passes an optimization barrier in the decode loop".

    Otherwise XLA:CPU hoists float32 copies of whole bfloat16 weights out of the loop.
    """
    return lax.optimization_barrier(tree)
