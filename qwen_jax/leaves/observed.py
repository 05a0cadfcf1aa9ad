"""Weights that see what they are multiplied by: what quantisers are calibrated with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.errors import InputError
from qwen_jax.kernels import grouped
from qwen_jax.leaves.weight import Component, Leaf, Weight, grouped_matmul, matmul


class Observed(Weight):
    """A dense `base`, whose products are its own. Gradients give what was seen: no other goes to it, or through it.

    That to `gram` is the sum of x xᵀ over all inputs x, that to `magnitude` the sum of |x|, whatever is differentiated.
    So sums over devices, loops and shards are made as they are for any gradient.
    """

    base: Component
    gram: Component  # float32 [in, in], or for each expert [E, in, in]
    magnitude: Component  # float32 [in] or [E, in]

    @classmethod
    def of(cls, base: jax.Array, num_front: int, num_in: int) -> Observed:
        """base [*front, *out, *in], of which experts are `front`, and the last `num_in` axes the input."""
        width = int(jnp.prod(jnp.asarray(base.shape[base.ndim - num_in :])))
        front = base.shape[:num_front]
        return cls(base, jnp.zeros((*front, width, width)), jnp.zeros((*front, width)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dense(self) -> jax.Array:
        return self.base

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        front = axes[: self.magnitude.ndim - 1]
        return [axes, (*front, None, None), (*front, None)]

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        def seen(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = x.reshape(-1, self.gram.shape[-1]).astype(jnp.float32)
            gram = lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
            return gram, jnp.sum(jnp.abs(rows), axis=0)

        product = functools.partial(matmul, num_in=num_in, dtype=dtype)
        return _product(product, seen, self.base, self.gram, self.magnitude, x)

    def grouped_matmul(self, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
        if rows.shape[1] != self.gram.shape[-1]:
            raise InputError("experts that are split over `tensor` do not see whole inputs; use `expert` or `fsdp`.")

        def seen(rows: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), rows.astype(jnp.float32), 0)
            gram = grouped.kernel_gradient(rows, rows, group_sizes, jnp.float32)
            ones = jnp.ones((len(rows), 1))
            return gram, grouped.kernel_gradient(jnp.abs(rows), ones, group_sizes, jnp.float32)[:, 0]

        product = functools.partial(grouped_matmul, dtype=dtype)
        return _product(product, seen, self.base, self.gram, self.magnitude, rows, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    product: Callable[..., jax.Array],
    seen: Callable[..., tuple[jax.Array, jax.Array]],
    base: Leaf,
    gram: jax.Array,
    magnitude: jax.Array,
    x: jax.Array,
    *rest: jax.Array,
) -> jax.Array:
    return product(base, x, *rest)


def _forward(
    product: Any, seen: Any, base: Any, gram: Any, magnitude: Any, x: jax.Array, *rest: jax.Array
) -> tuple[jax.Array, Any]:
    return product(base, x, *rest), (base, x, rest)


def _backward(product: Any, seen: Any, residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
    base, x, rest = residuals
    return jnp.zeros_like(base), *seen(x, *rest), jnp.zeros_like(x), *(None for _ in rest)


_product.defvjp(_forward, _backward)
