"""Mixed precision: products with a rounded copy of a weight, whose gradients are not rounded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.kernels import grouped
from qwen_jax.leaves import dense
from qwen_jax.leaves.lora import Lora
from qwen_jax.leaves.weight import Component, Leaf, Weight, grouped_matmul, matmul


class Rounded(Weight):
    """values[*out, *in], a rounded copy of the float32 `master`, which gets the gradients, summed in float32.

    The gradient of an array of bfloat16 would be one of bfloat16. Nothing reads the master.
    """

    values: Component
    master: Component

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    def dense(self) -> jax.Array:
        return _values(self.values, self.master)

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        return [axes, axes]

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        product = functools.partial(matmul, num_in=num_in, dtype=dtype)
        gradient = functools.partial(dense.kernel_gradient, num_in=num_in, dtype=jnp.float32)
        return _product(product, gradient, self.values, self.master, x)

    def grouped_matmul(self, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
        product = functools.partial(grouped_matmul, dtype=dtype)
        gradient = functools.partial(grouped.kernel_gradient, dtype=jnp.float32)
        return _product(product, gradient, self.values, self.master, rows, group_sizes)


def rounded(weight: Leaf, dtype: DTypeLike) -> Leaf:
    """A leaf that is multiplied in `dtype` and has float32 gradients; what is quantised stays as it is."""
    if isinstance(weight, Lora):
        return weight.replace(**{name: rounded(getattr(weight, name), dtype) for name in ("base", "a", "b")})
    if isinstance(weight, Weight):
        return weight
    return Rounded(lax.stop_gradient(weight).astype(dtype), weight.astype(jnp.float32))


@jax.custom_vjp
def _values(values: jax.Array, master: jax.Array) -> jax.Array:
    return values


_values.defvjp(lambda values, master: (values, None), lambda _, gradient: (None, gradient.astype(jnp.float32)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    product: Callable[..., jax.Array],
    gradient: Callable[..., jax.Array],
    values: jax.Array,
    master: jax.Array,
    x: jax.Array,
    *rest: jax.Array,
) -> jax.Array:
    return product(values, x, *rest)


def _forward(
    product: Any, gradient: Any, values: jax.Array, master: jax.Array, x: jax.Array, *rest: jax.Array
) -> tuple[jax.Array, Any]:
    return product(values, x, *rest), (values, x, rest)


def _backward(product: Any, gradient: Any, residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
    values, x, rest = residuals
    _, of_x = jax.vjp(lambda x: product(values, x, *rest), x)
    return None, gradient(x, dy.astype(x.dtype), *rest), *of_x(dy), *(None for _ in rest)


_product.defvjp(_forward, _backward)
