"""Keys and values in int8, each with a scale of its own."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Scaled(flax.struct.PyTreeNode):
    """values * scale, of keys or values [..., h] in int8."""

    values: jax.Array  # int8 [..., h]
    scale: jax.Array  # float32 [...]

    @classmethod
    def of(cls, x: jax.Array) -> Scaled:
        """The nearest multiples of each vector's largest magnitude / 127."""
        wide = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=-1) / 127
        return cls(jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def __getitem__(self, index: Any) -> Scaled:
        """Of the first axis, which is none of the vectors'."""
        return jax.tree.map(lambda x: x[index], self)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        return (self.values.astype(jnp.float32) * self.scale[..., None]).astype(dtype)


# keys or values as a cache holds them
Held = jax.Array | Scaled


def parts(held: Held) -> tuple[jax.Array, jax.Array | None]:
    """The numbers, and their scales where they have some."""
    return (held.values, held.scale) if isinstance(held, Scaled) else (held, None)


def widened(held: Held, dtype: DTypeLike) -> jax.Array:
    """As an array: int8 in `dtype`, what is none as it is."""
    return held.dense(dtype) if isinstance(held, Scaled) else held
