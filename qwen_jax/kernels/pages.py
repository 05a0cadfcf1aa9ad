"""One layer's keys and values in pages: how new ones are written, and how those of a row are found again."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.kernels.scaled import Scaled


class Pages(flax.struct.PyTreeNode):
    """N pages of P keys and values of K heads; int8 ones are multiplied by their scales."""

    k: jax.Array  # [K, N, P, h]
    v: jax.Array
    k_scale: jax.Array | None = None  # [N, K, P] float32
    v_scale: jax.Array | None = None

    @property
    def size(self) -> int:
        """Tokens of a page, P."""
        return self.k.shape[2]

    def written(self, tables: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | int) -> Pages:
        """With k and v [B, K, T, h] at places from `start` (one, or [B]) on, in the pages that `tables` [B, M] name.

        What falls beyond a table is dropped. Pages are written whole, so that two rows must not write to the same one.
        """
        num_pages, size, num_tokens = self.k.shape[1], self.size, k.shape[2]
        start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), tables.shape[:1])
        # as many pages as T tokens can touch, wherever they begin
        numbers = start[:, None] // size + jnp.arange((num_tokens + size - 2) // size + 1)[None]  # [B, n]
        touched = (numbers * size < start[:, None] + num_tokens) & (numbers < tables.shape[1])
        ids = jnp.where(touched, jnp.take_along_axis(tables, numbers, axis=1, mode="clip"), num_pages)  # N: no page
        token = numbers[:, :, None] * size + jnp.arange(size)[None, None] - start[:, None, None]  # [B, n, P]
        is_new = (token >= 0) & (token < num_tokens)
        at = jnp.clip(token, 0, num_tokens - 1).reshape(len(tables), 1, -1)  # [B, 1, n P]

        def merged(held: jax.Array, new: jax.Array) -> jax.Array:
            placed = jnp.take_along_axis(new, at[..., None], axis=2)  # [B, K, n P, h]
            placed = jnp.moveaxis(placed.reshape(*new.shape[:2], *ids.shape[1:], size, -1), 1, 0)  # [K, B, n, P, h]
            before = jnp.take(held, ids, axis=1, mode="clip")
            return held.at[:, ids].set(jnp.where(is_new[None, ..., None], placed, before), mode="drop")

        def merged_scale(held: jax.Array, new: jax.Array) -> jax.Array:
            placed = jnp.take_along_axis(new, at, axis=2)  # [B, K, n P]
            placed = jnp.moveaxis(placed.reshape(*new.shape[:2], *ids.shape[1:], size), 1, 2)  # [B, n, K, P]
            before = jnp.take(held, ids, axis=0, mode="clip")
            return held.at[ids].set(jnp.where(is_new[:, :, None], placed, before), mode="drop")

        if self.k_scale is None or self.v_scale is None:
            return self.replace(k=merged(self.k, k.astype(self.k.dtype)), v=merged(self.v, v.astype(self.v.dtype)))
        k8, v8 = Scaled.of(k), Scaled.of(v)
        return Pages(
            merged(self.k, k8.values),
            merged(self.v, v8.values),
            merged_scale(self.k_scale, k8.scale),
            merged_scale(self.v_scale, v8.scale),
        )

    def gathered(
        self, ids: jax.Array, first: jax.Array | int, ends: jax.Array, dtype: DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, m P, h] of pages `ids` [B, m], in `dtype` if they are int8.

        `first` is the place of the first, and what lies at `ends` [B] and beyond is 0, whatever the pages hold.
        """
        batch, count = ids.shape
        is_held = (first + jnp.arange(count * self.size))[None] < ends[:, None]  # [B, m P]

        def of(held: jax.Array, scale: jax.Array | None) -> jax.Array:
            found = jnp.moveaxis(jnp.take(held, ids, axis=1, mode="clip"), 0, 1)  # [B, K, m, P, h]
            found = found.reshape(batch, held.shape[0], count * self.size, -1)
            if scale is not None:
                factors = jnp.moveaxis(jnp.take(scale, ids, axis=0, mode="clip"), 2, 1)  # [B, K, m, P]
                found = (found.astype(jnp.float32) * factors.reshape(*found.shape[:3], 1)).astype(dtype)
            return jnp.where(is_held[:, None, :, None], found, 0)

        return of(self.k, self.k_scale), of(self.v, self.v_scale)
