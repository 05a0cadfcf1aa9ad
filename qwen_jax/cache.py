"""KV caches as values: they go into `forward` and come out of it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.backend import current_backend
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.layers.sharded_attention import attention
from qwen_jax.layers.sparse import SparseBudget, sparse_attention
from qwen_jax.sharding import cache_heads, constrain, current_mesh
from qwen_jax.unstacked import Unstacked


@runtime_checkable
class Cache(Protocol):
    """What the model asks of a cache. Only the cache knows where the keys and values of a place in a row lie."""

    @property
    def lengths(self) -> jax.Array:
        """[B] int32, tokens held: the place of the next one. The caller's to advance, once for all layers."""
        ...

    @property
    def prompt_lengths(self) -> jax.Array:
        """[B] int32, which fix Qwen1's dynamic NTK for the whole generation."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        ...

    def write(self, layer: jax.Array | int, k: jax.Array, v: jax.Array, start: jax.Array | int) -> Cache:
        """The cache with one layer's rotated keys and values [B, K, T, h] at the places from `start` (one, or [B]) on.

        Those beyond the capacity are dropped.
        """
        ...

    def attend(
        self, layer: jax.Array | int, q: jax.Array, spec: AttentionSpec, budget: SparseBudget | None
    ) -> jax.Array:
        """Attention of queries [(3,) B, T, H, h] over what the layer holds, within `budget`; [B, T, H, h]."""
        ...


class ContiguousCache(flax.struct.PyTreeNode):
    """The token at place p of row b lies in slot p of row b.

    `k` and `v` are stacked, [L, B, K, S, h], or apart, each layer [B, K, S, h], as the parameters are.
    """

    k: jax.Array | Unstacked
    v: jax.Array | Unstacked
    lengths: jax.Array  # [B] int32
    prompt_lengths: jax.Array  # [B] int32

    @property
    def capacity(self) -> int:
        """Slots per row, S."""
        return self.k[0].shape[-2]

    def write(self, layer: jax.Array | int, k: jax.Array, v: jax.Array, start: jax.Array | int) -> ContiguousCache:
        def written(held: jax.Array | Unstacked, new: jax.Array) -> jax.Array | Unstacked:
            if isinstance(held, Unstacked):
                assert isinstance(layer, int)
                return held.with_layer(layer, _written(held[layer], new, start))
            if _is_zero(start):
                return held.at[layer].set(_written(held[0], new, 0))
            where = (jnp.asarray(layer), *_slots(new, start))
            return held.at[where].set(new.astype(held.dtype), mode="drop")

        return self.replace(k=written(self.k, k), v=written(self.v, v))

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, [B, K, S, h]."""
        return self.k[layer], self.v[layer]

    def attend(
        self, layer: jax.Array | int, q: jax.Array, spec: AttentionSpec, budget: SparseBudget | None = None
    ) -> jax.Array:
        k, v = self.read(layer)
        if budget is None:
            return attention(q, k, v, spec)
        if current_mesh() is not None:
            raise InputError(
                "sparse prefill does not run on a mesh; use one device, or set sparse_attention_enabled to false."
            )
        return sparse_attention(q, k, v, spec, budget)[0]


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, *, stacked: bool, prompt_lengths: jax.Array
) -> ContiguousCache:
    """A cache with room for `capacity` tokens in each of `batch` rows, for activations of `dtype`.

    prompt_lengths [B] int32. On a mesh with more `tensor` shards than key/value heads every shard holds one, see
    `cache_heads`.
    """
    shape = (batch, cache_heads(config.num_kv_heads), capacity, config.head_dim)
    kept = current_backend().cache_dtype or dtype

    def zeros() -> jax.Array | Unstacked:
        if stacked:
            return _laid_out(jnp.zeros((config.num_layers, *shape), kept))
        return Unstacked(_laid_out(jnp.zeros(shape, kept)) for _ in range(config.num_layers))

    return ContiguousCache(zeros(), zeros(), jnp.zeros(batch, jnp.int32), prompt_lengths)


def _is_zero(start: jax.Array | int) -> bool:
    return isinstance(start, int) and start == 0


def _written(held: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    """[B, K, S, h] of a layer with new ones [B, K, T, h]."""
    new = new.astype(held.dtype)
    if _is_zero(start):  # a new beginning, so nothing of what was held counts
        new = new[:, :, : held.shape[2]]
        return _laid_out(jnp.pad(new, [(0, 0), (0, 0), (0, held.shape[2] - new.shape[2]), (0, 0)]))
    return held.at[_slots(new, start)].set(new, mode="drop")


def _slots(new: jax.Array, start: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices of rows, heads and slots for [B, K, T, h]."""
    batch, num_kv_heads, num_tokens, _ = new.shape
    places = jnp.asarray(start, jnp.int32).reshape(-1, 1, 1) + jnp.arange(num_tokens, dtype=jnp.int32)[None, None]
    return jnp.arange(batch)[:, None, None], jnp.arange(num_kv_heads)[None, :, None], places


def _laid_out(x: jax.Array) -> jax.Array:
    """[L,] B, K, S, h on the current mesh."""
    return constrain(x, *[None] * (x.ndim - 4), "batch", "kv_heads", "sequence", "head_dim")
