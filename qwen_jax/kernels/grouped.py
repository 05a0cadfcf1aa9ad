"""Products of rows that lie group by group, each group with its own matrix, as a mixture of experts makes them.

Only for TPUs XLA makes one: for CPUs and GPUs it multiplies every row by every matrix (docs/performance.md).
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.backend import current_backend
from qwen_jax.kernels import cpu

# rows [N, in] grouped along N, weight [E, out, in]
_RAGGED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
# dy [N, out] and rows [N, in], summed over the rows of each group
_RAGGED_GRADIENT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped_matmul(weight: jax.Array, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Each row of [N, in] times its own group's weight of [E, out, in], summed in float32: [N, out] in `dtype`.

    The first group_sizes[0] rows, int32 [E], are group 0's, and so on; rows beyond the groups come out undefined.
    """
    kernels = _kernels(weight.shape)
    if kernels:
        return _blocked(kernels, dtype, weight, rows, group_sizes)
    return lax.ragged_dot_general(rows, weight, group_sizes, _RAGGED, preferred_element_type=dtype)


def kernel_gradient(rows: jax.Array, dy: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
    """That of `grouped_matmul` to its weight [E, out, in], in `dtype`; rows [N, in], dy [N, out]."""
    kernels = _kernels((len(group_sizes), dy.shape[1], rows.shape[1]))
    if kernels == "cpu":
        return cpu.grouped_gradient(rows, dy, group_sizes).astype(dtype)
    if kernels == "gpu":
        from qwen_jax.kernels import grouped_gpu

        return grouped_gpu.grouped_gradient(rows, dy, group_sizes, dtype)
    return lax.ragged_dot_general(dy, rows, group_sizes, _RAGGED_GRADIENT, preferred_element_type=dtype)


def _kernels(shape: tuple[int, ...]) -> Literal["cpu", "gpu"] | None:
    """Whose kernels multiply with a weight of this shape; None: XLA's own."""
    match current_backend().kernels:
        case "cpu":
            return "cpu"
        case "gpu":
            from qwen_jax.kernels import grouped_gpu

            return "gpu" if grouped_gpu.fits(shape) else None
        case _:
            return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(kernels: str, dtype: DTypeLike, weight: jax.Array, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _product(kernels, weight, rows, group_sizes, dtype)


def _forward(
    kernels: str, dtype: DTypeLike, weight: jax.Array, rows: jax.Array, group_sizes: jax.Array
) -> tuple[jax.Array, Any]:
    return _product(kernels, weight, rows, group_sizes, dtype), (weight, rows, group_sizes)


def _backward(kernels: str, dtype: DTypeLike, operands: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    weight, rows, group_sizes = operands
    dy = dy.astype(rows.dtype)
    d_rows = _product(kernels, weight, dy, group_sizes, rows.dtype, transposed=True)
    d_rows = jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), d_rows, 0)
    return kernel_gradient(rows, dy, group_sizes, weight.dtype), d_rows, None


def _product(
    kernels: str,
    weight: jax.Array,
    rows: jax.Array,
    group_sizes: jax.Array,
    dtype: DTypeLike,
    transposed: bool = False,
) -> jax.Array:
    if kernels == "cpu":
        weight = jnp.swapaxes(weight, 1, 2) if transposed else weight
        return cpu.grouped_matmul(rows, weight, group_sizes).astype(dtype)
    from qwen_jax.kernels import grouped_gpu

    return grouped_gpu.grouped_matmul(rows, weight, group_sizes, dtype, transposed=transposed)


_blocked.defvjp(_forward, _backward)
