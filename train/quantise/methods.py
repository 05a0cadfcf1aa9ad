"""What a quantiser does with matrices that share their inputs, and the simplest: the nearest numbers in 8 bits."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.leaves import Grouped, Int8
from qwen_jax.sharding import constrain

Coded = Int8 | Grouped
FP8_MAX = 448.0  # of float8_e4m3fn


class Seen(NamedTuple):
    """Of the inputs x that a matrix met: the sums of x xᵀ, float32 [*experts, in, in], and of |x|, [*experts, in]."""

    gram: jax.Array
    magnitude: jax.Array


class Method(Protocol):
    """One matrix [out, in] in few bits, given what it met."""

    def __call__(self, weight: jax.Array, seen: Seen) -> Coded: ...


def int8(weight: jax.Array, seen: Seen) -> Int8:
    """The nearest multiples of each channel's largest magnitude / 127."""
    return Int8.quantise(weight)


def fp8(weight: jax.Array, seen: Seen, *, block: int, dtype: Any) -> Grouped:
    """The nearest float8_e4m3fn, after each square of block x block has been scaled to its range; scales in `dtype`."""
    num_out, num_in = weight.shape
    rows = jnp.pad(weight, ((0, -num_out % block), (0, 0))).reshape(-1, block, num_in // block, block)
    largest = jnp.max(jnp.abs(rows), axis=(1, 3))
    scale = not_zero((largest / FP8_MAX).astype(dtype))
    scale = jnp.repeat(scale, block, axis=0)[:num_out]  # [out, groups]
    values = weight.reshape(num_out, -1, block) / scale[..., None].astype(jnp.float32)
    return Grouped(jnp.clip(values, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn), scale)


def not_zero(scale: jax.Array) -> jax.Array:
    """Scales that one can divide by: the smallest of their type that is not 0 in the place of 0."""
    return jnp.maximum(scale, jnp.finfo(scale.dtype).smallest_subnormal)


def squared_outputs(weight: jax.Array, gram: jax.Array) -> jax.Array:
    """The sum of |W x|² over the inputs x that a matrix [out, in] met."""
    product = lax.dot_general(weight, gram, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return jnp.sum(product * weight)


def by_rows(weight: jax.Array) -> jax.Array:
    """A matrix [out, in] cut over a mesh between its rows, none of which needs another, as a batch is cut."""
    return constrain(weight, "batch", None)
