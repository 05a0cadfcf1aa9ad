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
from qwen_jax.kernels.scaled import Held, Scaled, widened
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

    `k` and `v` are stacked, [L, B, K, S, h], or apart, each layer [B, K, S, h], as the parameters are. In int8 they are
    rounded as they are written: the first tokens of a row see each other exactly, whoever reads the cache does not.
    """

    k: Held | Unstacked
    v: Held | Unstacked
    lengths: jax.Array  # [B] int32
    prompt_lengths: jax.Array  # [B] int32

    @property
    def capacity(self) -> int:
        """Slots per row, S."""
        return self.k[0].shape[-2]

    def write(self, layer: jax.Array | int, k: jax.Array, v: jax.Array, start: jax.Array | int) -> ContiguousCache:
        def into_stack(held: jax.Array, new: jax.Array) -> jax.Array:
            if _is_zero(start):
                return held.at[layer].set(_written(held[0], new, 0))
            where = (jnp.asarray(layer), *_slots(new, start))
            return held.at[where].set(new.astype(held.dtype), mode="drop")

        def written(held: Held | Unstacked, x: jax.Array) -> Held | Unstacked:
            new = Scaled.of(x) if isinstance(held[0], Scaled) else x
            if isinstance(held, Unstacked):
                assert isinstance(layer, int)
                here = jax.tree.map(lambda held, new: _written(held, new, start), held[layer], new)
                return held.with_layer(layer, here)
            return jax.tree.map(into_stack, held, new)

        return self.replace(k=written(self.k, k), v=written(self.v, v))

    def read(self, layer: jax.Array | int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, [B, K, S, h]; those of int8 in `dtype`."""
        return widened(self.k[layer], dtype), widened(self.v[layer], dtype)

    def attend(
        self, layer: jax.Array | int, q: jax.Array, spec: AttentionSpec, budget: SparseBudget | None = None
    ) -> jax.Array:
        if budget is None:
            return attention(q, self.k[layer], self.v[layer], spec)
        if current_mesh() is not None:
            raise InputError(
                "sparse prefill does not run on a mesh; use one device, or set sparse_attention_enabled to false."
            )
        return sparse_attention(q, *self.read(layer, q.dtype), spec, budget)[0]


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, *, stacked: bool, prompt_lengths: jax.Array
) -> ContiguousCache:
    """A cache with room for `capacity` tokens in each of `batch` rows, for activations of `dtype`.

    prompt_lengths [B] int32. The backend's `cache_dtype` may say another dtype; with int8 every key and value has a
    scale. On a mesh with more `tensor` shards than key/value heads every shard holds one, see
    `cache_heads`.
    """
    shape = (batch, cache_heads(config.num_kv_heads), capacity, config.head_dim)
    kept = current_backend().cache_dtype or dtype

    def zeros() -> Held | Unstacked:
        if stacked:
            return of(config.num_layers)
        return Unstacked(of() for _ in range(config.num_layers))

    def of(*layers: int) -> Held:
        values = _laid_out(jnp.zeros((*layers, *shape), kept), len(layers))
        if jnp.dtype(kept) != jnp.int8:
            return values
        return Scaled(values, _laid_out(jnp.zeros((*layers, *shape[:-1])), len(layers)))

    return ContiguousCache(zeros(), zeros(), jnp.zeros(batch, jnp.int32), prompt_lengths)


def _is_zero(start: jax.Array | int) -> bool:
    return isinstance(start, int) and start == 0


def _written(held: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    """[B, K, S, h] of a layer, or scales [B, K, S], with new ones in place of S = T of them."""
    new = new.astype(held.dtype)
    if _is_zero(start):  # a new beginning, so nothing of what was held counts
        new = new[:, :, : held.shape[2]]
        return _laid_out(jnp.pad(new, [(0, 0), (0, 0), (0, held.shape[2] - new.shape[2])] + [(0, 0)] * (new.ndim - 3)))
    return held.at[_slots(new, start)].set(new, mode="drop")


def _slots(new: jax.Array, start: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices of rows, heads and slots for [B, K, T, h] or [B, K, T]."""
    batch, num_kv_heads, num_tokens = new.shape[:3]
    places = jnp.asarray(start, jnp.int32).reshape(-1, 1, 1) + jnp.arange(num_tokens, dtype=jnp.int32)[None, None]
    return jnp.arange(batch)[:, None, None], jnp.arange(num_kv_heads)[None, :, None], places


def _laid_out(x: jax.Array, layers: int = 0) -> jax.Array:
    """[B, K, S, h] or [B, K, S] on the current mesh; `layers` axes in front."""
    names = (*[None] * layers, "batch", "kv_heads", "sequence", "head_dim")
    return constrain(x, *names[: x.ndim])
