"""Projections. Weights are stored as PyTorch stores them, [out, in], so conversion never transposes."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from qwen_jax.backend import current_backend
from qwen_jax.layers.param import declare
from qwen_jax.sharding import current_mesh

# Rows of x up to which the kernel is the left operand, see `project`.
FEW_ROWS = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(kernel: jax.Array, x: jax.Array, num_in: int = 1, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Sums `kernel[*out, *in] * x[*batch, *in]` over the last `num_in` axes in float32; result [*batch, *out].

    One plain matrix product. For few rows of x the kernel is the left operand, because XLA:CPU then streams it at
    memory bandwidth, and the right one for many (docs/performance.md); other backends choose the order themselves.
    """
    return _product(kernel, x, num_in, dtype)[0]


def product_dtype(dtype: DTypeLike) -> DTypeLike:
    """The type in which a product that will be rounded to `dtype` is best asked for.

    Where devices each sum a part of a product, they exchange their sums in this type, so bfloat16 halves what the links
    carry.
    """
    return current_backend().product_dtype or dtype


def _product(
    kernel: jax.Array, x: jax.Array, num_in: int, dtype: DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    num_out, num_batch = kernel.ndim - num_in, x.ndim - num_in
    out_shape, batch_shape = kernel.shape[:num_out], x.shape[:num_batch]
    num_rows = math.prod(batch_shape)
    if num_rows > FEW_ROWS and current_mesh() is not None:
        # axes stay apart: rows and sequence may be split over different axes of a mesh
        contract = (tuple(range(num_batch, x.ndim)), tuple(range(num_out, kernel.ndim)))
        return lax.dot_general(x, kernel, (contract, ((), ())), preferred_element_type=dtype), (kernel, x)
    matrix = kernel.reshape(math.prod(out_shape), -1)  # [out, in]; of three axes XLA:CPU would make a copy
    rows = x.reshape(num_rows, -1)  # [rows, in]
    multiply = functools.partial(
        lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=dtype
    )
    if num_rows > FEW_ROWS:
        y = multiply(rows, matrix)
    else:
        if num_rows == 1 and x.dtype == jnp.bfloat16 and current_backend().kernels == "cpu":
            rows = jnp.broadcast_to(rows, (2, rows.shape[1]))  # XLA:CPU converts the kernel for a single one
        y = multiply(matrix, rows)[:, :num_rows].T
    return y.reshape(*batch_shape, *out_shape), (kernel, x)


def _gradients(
    num_in: int, dtype: DTypeLike, operands: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two matrix products of x's dtype, summed in float32, where JAX's own rule would multiply in float32."""
    kernel, x = operands
    num_batch, num_out = x.ndim - num_in, kernel.ndim - num_in
    dy = dy.astype(x.dtype)
    contract = (tuple(range(num_batch, dy.ndim)), tuple(range(num_out)))
    dx = lax.dot_general(dy, kernel, (contract, ((), ())), preferred_element_type=product_dtype(x.dtype))
    if x.dtype == jnp.float32 and current_mesh() is None:
        # XLA:CPU transposes a matrix within its product, but more axes of float32 by a slow copy of their own
        x_rows, dy_rows = (array.reshape(math.prod(x.shape[:num_batch]), -1) for array in (x, dy))
        dkernel = lax.dot_general(dy_rows, x_rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    else:
        batch = tuple(range(num_batch))
        dkernel = lax.dot_general(dy, x, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)
    return dkernel.reshape(kernel.shape).astype(kernel.dtype), dx.astype(x.dtype)


project.defvjp(_product, _gradients)


class Linear(nn.Module):
    """y[..., *out] = kernel[*out, *in] x[..., *in] (+ bias[*out]), accumulated in float32, returned in x's dtype."""

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_axes: tuple[str, ...]
    in_axes: tuple[str, ...]
    use_bias: bool = False
    std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, shape = nn.initializers.normal(self.std), self.out_shape + self.in_shape
        kernel = declare(self, "kernel", init, shape, self.out_axes + self.in_axes)
        dtype = jnp.float32 if self.use_bias else product_dtype(x.dtype)
        y: Any = project(kernel.astype(x.dtype), x, len(self.in_shape), dtype)
        if self.use_bias:
            bias = declare(self, "bias", nn.initializers.zeros, self.out_shape, self.out_axes)
            y += bias.astype(jnp.float32).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return checkpoint_name(y.astype(x.dtype), "projection")


def residual_std(std: float, num_layers: int) -> float:
    """Qwen1's smaller initialisation of the two projections that write to the residual stream (B1: std / sqrt(2 L))."""
    return std / math.sqrt(2 * num_layers)
