"""KV caches as values: they go into `forward` and come out of it."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig


class Cache(flax.struct.PyTreeNode):
    """Rotated keys and values of every layer. Row b's token at position p lies in slot p of row b.

    `k` and `v` are one array [L, B, S, K, h] beside stacked parameters, or a tuple of L arrays [B, S, K, h] beside
    unstacked ones.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    lengths: jax.Array  # [B] int32, tokens held
    prompt_lengths: jax.Array  # [B] int32, which fix Qwen1's dynamic NTK for the whole generation

    @property
    def capacity(self) -> int:
        """Slots per row, S."""
        return self.k[0].shape[-3]

    def append(
        self, layer: jax.Array | int, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Writes new keys and values [B, T, K, h] of one layer; returns the cache and that layer's, [B, S, K, h].

        Positions beyond the capacity are dropped. `lengths` is the caller's to advance, once for all layers.
        """
        rows = jnp.arange(k.shape[0])[:, None]
        if isinstance(self.k, tuple) and isinstance(self.v, tuple):
            keys = self.k[layer].at[rows, positions].set(k, mode="drop")
            values = self.v[layer].at[rows, positions].set(v, mode="drop")
            new_k = (*self.k[:layer], keys, *self.k[layer + 1 :])
            new_v = (*self.v[:layer], values, *self.v[layer + 1 :])
            return self.replace(k=new_k, v=new_v), keys, values
        new_k = self.k.at[layer, rows, positions].set(k, mode="drop")
        new_v = self.v.at[layer, rows, positions].set(v, mode="drop")
        return self.replace(k=new_k, v=new_v), new_k[layer], new_v[layer]


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, *, stacked: bool, prompt_lengths: jax.Array
) -> Cache:
    """A cache with room for `capacity` tokens in each of `batch` rows; `prompt_lengths` [B] int32."""
    shape = (batch, capacity, config.num_kv_heads, config.head_dim)

    def zeros() -> jax.Array | tuple[jax.Array, ...]:
        if stacked:
            return jnp.zeros((config.num_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    return Cache(zeros(), zeros(), jnp.zeros(batch, jnp.int32), prompt_lengths)


def cache_from_prefill(
    k: jax.Array | tuple[jax.Array, ...], v: jax.Array | tuple[jax.Array, ...], lengths: jax.Array, capacity: int
) -> Cache:
    """A cache of `capacity` slots that begins with a prefill's keys and values ([L,] B, T, K, h), T <= capacity."""

    def grow(x: jax.Array) -> jax.Array:
        room = [(0, 0)] * x.ndim
        room[-3] = (0, capacity - x.shape[-3])
        return jnp.pad(x, room)

    return Cache(jax.tree.map(grow, k), jax.tree.map(grow, v), lengths, lengths)
