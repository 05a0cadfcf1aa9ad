"""Products with a dense array, and their gradients."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.backend import current_backend
from qwen_jax.sharding import current_mesh


def matmul(kernel: jax.Array, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
    """Sums `kernel[*out, *in] * x[*batch, *in]` over the last `num_in` axes in float32; [*batch, *out] in `dtype`."""
    if current_mesh() is not None:
        return _contract(kernel, x, num_in, dtype)  # axes stay apart: they may be split over different axes of a mesh
    out_shape, batch_shape = kernel.shape[: kernel.ndim - num_in], x.shape[: x.ndim - num_in]
    matrix, rows = kernel.reshape(math.prod(out_shape), -1), x.reshape(math.prod(batch_shape), -1)
    y: Any = _contract(matrix, rows, 1, dtype)
    return y.reshape(*batch_shape, *out_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _contract(kernel: jax.Array, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
    contracted = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(kernel.ndim - num_in, kernel.ndim)))
    return lax.dot_general(x, kernel, (contracted, ((), ())), preferred_element_type=dtype)


def _forward(
    kernel: jax.Array, x: jax.Array, num_in: int, dtype: DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _contract(kernel, x, num_in, dtype), (kernel, x)


def _backward(
    num_in: int, dtype: DTypeLike, operands: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two matrix products of x's dtype, summed in float32, where JAX's own rule would multiply in float32.

    Both leave in the operand's dtype, which is that in which devices sum and exchange them.
    """
    kernel, x = operands
    num_batch, num_out = x.ndim - num_in, kernel.ndim - num_in
    dy = dy.astype(x.dtype)
    contracted = (tuple(range(num_batch, dy.ndim)), tuple(range(num_out)))
    dx_dtype = current_backend().product_dtype or x.dtype
    dx = lax.dot_general(dy, kernel, (contracted, ((), ())), preferred_element_type=dx_dtype)
    dkernel = kernel_gradient(x, dy, num_in, current_backend().product_dtype or kernel.dtype)
    return dkernel.astype(kernel.dtype), dx.astype(x.dtype)


_contract.defvjp(_forward, _backward)


def kernel_gradient(x: jax.Array, dy: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
    """That of `matmul` to its kernel [*out, *in], summed in float32, in `dtype`; x [*batch, *in], dy [*batch, *out]."""
    batch = tuple(range(x.ndim - num_in))
    return lax.dot_general(dy, x, ((batch, batch), ((), ())), preferred_element_type=dtype)


@jax.custom_vjp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids], zeros where an id is none of the rows. The gradient of a row is summed in float32."""
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=0)


def _lookup_forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
    return lookup(table, ids), (ids, jnp.empty((len(table), 0), table.dtype))


def _lookup_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None]:
    ids, like_table = residuals
    sums = jnp.zeros((len(like_table), cotangent.shape[-1]), jnp.float32)
    return sums.at[ids].add(cotangent.astype(jnp.float32), mode="drop").astype(like_table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
