"""KV caches as values: they go into `forward` and come out of it."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.config import ModelConfig
from qwen_jax.sharding import cache_heads, constrain


class Cache(flax.struct.PyTreeNode):
    """Rotated keys and values of every layer. Row b's token at position p lies in slot p of row b.

    `k` and `v` are one array [L, B, K, S, h] beside stacked parameters, or a tuple of L arrays [B, K, S, h] beside
    unstacked ones.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    lengths: jax.Array  # [B] int32, tokens held
    prompt_lengths: jax.Array  # [B] int32, which fix Qwen1's dynamic NTK for the whole generation

    @property
    def capacity(self) -> int:
        """Slots per row, S."""
        return self.k[0].shape[-2]

    def append(
        self, layer: jax.Array | int, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Writes new keys and values [B, K, T, h] of one layer; returns the cache and that layer's, [B, K, S, h].

        Positions [B, T] beyond the capacity are dropped. `lengths` is the caller's to advance, once for all layers.
        """
        batch, num_kv_heads = k.shape[:2]
        where = (jnp.arange(batch)[:, None, None], jnp.arange(num_kv_heads)[None, :, None], positions[:, None, :])

        def write(held: jax.Array | tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array | tuple, jax.Array]:
            if isinstance(held, tuple):
                updated = held[layer].at[where].set(new.astype(held[layer].dtype), mode="drop")
                return (*held[:layer], updated, *held[layer + 1 :]), updated
            held = held.at[(layer, *where)].set(new.astype(held.dtype), mode="drop")
            return held, held[layer]

        new_k, keys = write(self.k, k)
        new_v, values = write(self.v, v)
        return self.replace(k=new_k, v=new_v), keys, values


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, *, stacked: bool, prompt_lengths: jax.Array
) -> Cache:
    """A cache with room for `capacity` tokens in each of `batch` rows; `prompt_lengths` [B] int32.

    On a mesh with more `tensor` shards than key/value heads every shard holds one, see `cache_heads`.
    """
    shape = (batch, cache_heads(config.num_kv_heads), capacity, config.head_dim)

    def zeros() -> jax.Array | tuple[jax.Array, ...]:
        if stacked:
            return _laid_out(jnp.zeros((config.num_layers, *shape), dtype))
        return tuple(_laid_out(jnp.zeros(shape, dtype)) for _ in range(config.num_layers))

    return Cache(zeros(), zeros(), jnp.zeros(batch, jnp.int32), prompt_lengths)


def cache_from_prefill(
    k: jax.Array | tuple[jax.Array, ...],
    v: jax.Array | tuple[jax.Array, ...],
    lengths: jax.Array,
    capacity: int,
    dtype: DTypeLike,
) -> Cache:
    """A cache of `capacity` slots that begins with a prefill's keys and values ([L,] B, K, T, h), T <= capacity."""

    def grow(x: jax.Array) -> jax.Array:
        room = [(0, 0)] * x.ndim
        room[-2] = (0, capacity - x.shape[-2])
        return _laid_out(jnp.pad(x.astype(dtype), room))

    return Cache(jax.tree.map(grow, k), jax.tree.map(grow, v), lengths, lengths)


def _laid_out(x: jax.Array) -> jax.Array:
    """[L,] B, K, S, h on the current mesh."""
    return constrain(x, *[None] * (x.ndim - 4), "batch", "kv_heads", "sequence", "head_dim")
