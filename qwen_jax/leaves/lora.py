"""Low-rank adaptation: a weight of any kind plus a product of two narrow matrices (LoRA, arXiv 2106.09685).

With a magnitude, each row of the sum has that length instead of its own (DoRA, arXiv 2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.leaves.weight import Component, Leaf, Weight, grouped_matmul, lookup, matmul


class Lora(Weight):
    """base[*out, *in] + scaling * b[*out, r] a[r, *in].

    Whoever trains it takes gradients of all but the base; the products for the base's are then not made.
    """

    base: Component
    a: Component
    b: Component
    magnitude: Component = None  # [*out], or None
    scaling: float = flax.struct.field(pytree_node=False, default=1.0)

    @classmethod
    def create(
        cls,
        base: Leaf | jax.ShapeDtypeStruct,
        rank: int,
        alpha: float,
        key: jax.Array,
        *,
        num_in: int = 1,
        num_front: int = 0,
    ) -> Lora:
        """An adapter that changes nothing yet, float32: b is 0, a uniform within 1 / sqrt(in), as PEFT begins.

        num_front: axes of experts or layers in front of the base's [*out, *in].
        """
        front, inner = base.shape[:num_front], base.shape[base.ndim - num_in :]
        bound = 1 / math.sqrt(math.prod(inner))
        a = jax.random.uniform(key, (*front, rank, *inner), minval=-bound, maxval=bound)
        return cls(base, a, jnp.zeros((*base.shape[: base.ndim - num_in], rank)), scaling=alpha / rank)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def astype(self, dtype: DTypeLike) -> Lora:
        return self.replace(base=self.base.astype(dtype), a=self.a.astype(dtype), b=self.b.astype(dtype))

    @property
    def _num_front(self) -> int:
        return self.a.ndim + self.b.ndim - 2 - self.base.ndim

    def _sum(self) -> jax.Array:
        """float32, without the magnitude."""
        product = jnp.tensordot
        for _ in range(self._num_front):
            product = jax.vmap(product, (0, 0, None))
        base, a, b = (x.dense() if isinstance(x, Weight) else x for x in (self.base, self.a, self.b))
        return base.astype(jnp.float32) + self.scaling * product(b, a, 1)

    def _stretch(self, total: jax.Array | None = None) -> jax.Array | float:
        """[*out]: what each row is multiplied by. The length of rows counts as constant, as in DoRA's section 4.3."""
        if self.magnitude is None:
            return 1.0
        total = self._sum() if total is None else total
        num_out = self.b.ndim - 1
        length = jnp.sqrt(jnp.sum(jnp.square(total), tuple(range(num_out, total.ndim))))
        return self.magnitude.astype(jnp.float32) / lax.stop_gradient(length)

    def dense(self) -> jax.Array:
        total = self._sum()
        if self.magnitude is not None:
            stretch = jnp.asarray(self._stretch(total))
            total *= stretch.reshape(*stretch.shape, *[1] * (total.ndim - stretch.ndim))
        return total.astype(self.dtype)

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        front, inner = tuple(axes[: self._num_front]), tuple(axes[self.b.ndim - 1 :])
        outer = tuple(axes[: self.b.ndim - 1])
        parts = [(self.base, axes), (self.a, (*front, None, *inner)), (self.b, (*outer, None))]
        parts += [] if self.magnitude is None else [(self.magnitude, outer)]
        return [each for part, names in parts for each in (part.axes(names) if isinstance(part, Weight) else [names])]

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        narrow = matmul(self.a, x, num_in).astype(x.dtype)
        y = matmul(self.base, x, num_in) + self.scaling * matmul(self.b, narrow)
        if self.magnitude is not None:
            stretch = jnp.asarray(self._stretch())
            y *= stretch.reshape(*[1] * (y.ndim - stretch.ndim), *stretch.shape)
        return y.astype(dtype)

    def lookup(self, ids: jax.Array) -> jax.Array:
        if self.magnitude is not None:
            return super().lookup(ids)
        rows = lookup(self.b, ids) @ self.a
        return (lookup(self.base, ids).astype(jnp.float32) + self.scaling * rows).astype(self.dtype)

    def grouped_matmul(self, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
        if self.magnitude is not None:
            return super().grouped_matmul(rows, group_sizes, dtype)
        narrow = grouped_matmul(self.a, rows, group_sizes).astype(rows.dtype)
        added = grouped_matmul(self.b, narrow, group_sizes)
        return (grouped_matmul(self.base, rows, group_sizes) + self.scaling * added).astype(dtype)
