"""Weights in 8 bits, integers or floats, with a scale for each output channel."""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.backend import current_backend
from qwen_jax.leaves.weight import Component, Weight, grouped_matmul, lookup, matmul


class Int8(Weight):
    """values[*out, *in] * scale[*out]. No gradient goes to it; gradients go through it.

    Activations keep their type; under a backend of `integer_products` they are rounded (W8A8), which has no gradient.
    """

    values: Component  # int8 or float8_e4m3fn
    scale: Component
    float_dtype: jnp.dtype | None = flax.struct.field(pytree_node=False, default=None)
    """Of the array that this stands for; None: the scale's."""

    @classmethod
    def quantise(cls, weight: jax.Array, num_in: int = 1) -> Int8:
        """The nearest multiples of each channel's largest magnitude / 127; the last `num_in` axes are summed over."""
        summed = tuple(range(weight.ndim - num_in, weight.ndim))
        scale = (jnp.max(jnp.abs(weight), summed, keepdims=True).astype(jnp.float32) / 127).astype(weight.dtype)
        values = weight.astype(jnp.float32) / jnp.where(scale == 0, 1, scale).astype(jnp.float32)
        return cls(jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8), jnp.squeeze(scale, summed))

    def of_matrix(self, out_shape: tuple[int, ...], in_shape: tuple[int, ...]) -> Int8:
        """A matrix [out, in] with its axes split."""
        return self.replace(values=self.values.reshape(*out_shape, *in_shape), scale=self.scale.reshape(out_shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.scale.dtype if self.float_dtype is None else self.float_dtype

    def astype(self, dtype: DTypeLike) -> Int8:
        return self.replace(float_dtype=jnp.dtype(dtype))

    def dense(self) -> jax.Array:
        scale = self.scale.reshape(self.scale.shape + (1,) * (self.values.ndim - self.scale.ndim))
        return (self.values.astype(jnp.float32) * scale.astype(jnp.float32)).astype(self.dtype)

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        return [axes, axes[: self.scale.ndim]]

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        if current_backend().integer_products and self.values.dtype == jnp.int8:
            y = _integer_product(self.values, x, num_in)
        else:
            y = matmul(self.values, x, num_in)
        scale = self.scale.astype(jnp.float32)
        return (y * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)).astype(dtype)

    def lookup(self, ids: jax.Array) -> jax.Array:
        scale = lookup(self.scale[:, None], ids).astype(jnp.float32)
        return (lookup(self.values, ids).astype(jnp.float32) * scale).astype(self.dtype)

    def grouped_matmul(self, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
        group = jnp.repeat(jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=len(rows))
        return (grouped_matmul(self.values, rows, group_sizes) * self.scale[group].astype(jnp.float32)).astype(dtype)


def _integer_product(values: jax.Array, x: jax.Array, num_in: int) -> jax.Array:
    """float32 [*batch, *out] of int8 values [*out, *in] and x, each of whose tokens is rounded to 127 steps."""
    summed = tuple(range(x.ndim - num_in, x.ndim))
    wide = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(wide), summed, keepdims=True) / 127
    codes = jnp.round(wide / jnp.where(step == 0, 1, step)).astype(jnp.int8)
    contracted = summed, tuple(range(values.ndim - num_in, values.ndim))
    y = lax.dot_general(codes, values, (contracted, ((), ())), preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * step.reshape(*x.shape[: x.ndim - num_in], *[1] * (values.ndim - num_in))
