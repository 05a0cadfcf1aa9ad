"""Attention in plain jnp: the formula, which every other implementation must equal, and its blocked forms.

All take q [B, T, H, h], k and v [B, K, S, h] as caches hold them, and an AttentionSpec, and return the output
[B, T, H, h] in q's dtype and the log-sum-exp of the scores, float32 [B, H, T], by which parts are merged. With
`spec.chunk_length`, q is [3, B, T, H, h]: every query as it is turned toward keys of its own chunk, of the one before,
and of earlier ones (Dual Chunk Attention, arXiv 2402.17463), in one softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from qwen_jax.kernels.scaled import Held, widened
from qwen_jax.kernels.spec import AttentionSpec

# Queries of a block, which bounds the [B, H, T, S] scores that are held at a time.
QUERY_BLOCK = 512
# Shorter prompts are read in at most this many blocks, of at least this many queries, each over the keys up to its end.
CAUSAL_BLOCKS, SMALLEST_BLOCK = 8, 64
# Several queries over a cache, as in prefill by pieces, read this many keys at a time.
KEY_BLOCK = 512

Attended = tuple[jax.Array, jax.Array]


def product_of_heads(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B, K, n, h] times k [B, K, S, h]: float32 [B, K, n, S]."""
    return jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32)


def formula(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    product: Callable[[jax.Array, jax.Array], jax.Array] = product_of_heads,
) -> Attended:
    """softmax(q k^T / sqrt(h)) v over the keys each query sees, all scores at once."""
    seen = spec.mask(q.shape[-3], k.shape[2])[:, None, None]  # [B, 1, 1, T, S]
    scores = jnp.where(seen, _scores(q, k, spec, product), jnp.finfo(jnp.float32).min)
    largest = lax.stop_gradient(jnp.max(scores, axis=-1))
    # the weights are rounded before they are summed, so that the sum is that of what multiplies the values
    weights = jnp.exp(scores - largest[..., None]).astype(v.dtype)
    total = jnp.sum(weights, axis=-1, dtype=jnp.float32)
    # normalised after the second product, which has fewer elements than the weights
    return _normalised(_weighted(weights, v), total, largest, q.dtype)


def by_causal_blocks(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> Attended:
    """New tokens among themselves: each block of queries with the keys up to its end."""
    num_queries, parts = q.shape[-3], []
    block = max(SMALLEST_BLOCK, -(-num_queries // CAUSAL_BLOCKS))
    for i in range(0, num_queries, block):
        stop = min(i + block, num_queries)
        here = spec.of_queries(i, stop - i).of_keys(0, stop)
        parts.append(formula(q[..., i:stop, :, :], k[:, :, :stop], v[:, :, :stop], here))
    out = checkpoint_name(jnp.concatenate([out for out, _ in parts], axis=1), "attention")
    return out, jnp.concatenate([lse for _, lse in parts], axis=2)


def by_query_blocks(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> Attended:
    """A block of queries at a time, of which there are a multiple of QUERY_BLOCK."""

    def block(begin: jax.Array) -> Attended:
        queries = lax.dynamic_slice_in_dim(q, begin, QUERY_BLOCK, axis=q.ndim - 3)
        return formula(queries, k, v, spec.of_queries(begin, QUERY_BLOCK))

    out, lse = lax.map(block, jnp.arange(0, q.shape[-3], QUERY_BLOCK))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[-4:]), jnp.moveaxis(lse, 0, 2).reshape(*lse.shape[1:3], -1)


def by_key_blocks(q: jax.Array, k: Held, v: Held, spec: AttentionSpec) -> Attended:
    """A block of keys at a time, see `over_key_blocks`."""
    num_keys = k.shape[2]
    block = min(KEY_BLOCK, num_keys)

    def read(begin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = jnp.minimum(begin, num_keys - block)  # the last block reaches back where S is no multiple
        keys, values = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block, axis=2), (k, v))
        return widened(keys, q.dtype), widened(values, q.dtype), start

    return over_key_blocks(q, read, k.shape[1], num_keys, block, spec)


def over_key_blocks(
    q: jax.Array,
    read: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]],
    num_kv_heads: int,
    num_keys: int,
    block: int,
    spec: AttentionSpec,
) -> Attended:
    """A running softmax, in memory that does not grow with S, over blocks of keys that `read` fetches.

    read(begin) -> (k, v [B, K, block, h], the number of their first key), which is `begin` or somewhat before it. A
    block that no query sees is not fetched.
    """
    batch, num_queries, num_heads, head_dim = q.shape[-4:]
    first = jnp.asarray(spec.start)
    last, before = jnp.max(first) + num_queries - 1, -1
    if spec.window is not None:
        before = jnp.min(first) - spec.window

    def one(carry: tuple[jax.Array, jax.Array, jax.Array], begin: jax.Array) -> tuple[Any, None]:
        def fetch(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            out, total, largest = carry
            k, v, start = read(begin)
            here = spec.of_keys(start, block)
            is_new = start + jnp.arange(block) >= begin
            seen = (here.mask(num_queries, block) & is_new[None, None])[:, None, None]  # [B, 1, 1, T, S]
            scores = jnp.where(seen, _scores(q, k, here, product_of_heads), jnp.finfo(jnp.float32).min)
            highest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            shrink = jnp.exp(largest - highest)
            weights = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0.0).astype(v.dtype)
            out = out * shrink[..., None] + _weighted(weights, v)
            return out, total * shrink + jnp.sum(weights, axis=-1, dtype=jnp.float32), highest

        place = jnp.asarray(spec.key_start) + begin
        in_sight = jnp.max(place) + block - 1 > before
        if spec.causal:
            in_sight &= jnp.min(place) <= last
        return lax.cond(in_sight, fetch, lambda carry: carry, carry), None

    shape = (batch, num_kv_heads, num_heads // num_kv_heads, num_queries)
    start = (jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, jnp.finfo(jnp.float32).min))
    (out, total, largest), _ = lax.scan(one, start, jnp.arange(0, num_keys, block))
    # of a device's part of a cache a query may see nothing
    return _normalised(out, jnp.where(total == 0, 1.0, total), largest, q.dtype)


def _scores(
    q: jax.Array, k: jax.Array, spec: AttentionSpec, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """float32 [B, K, G, T, S] before the mask."""
    batch, num_queries, num_heads, head_dim = q.shape[-4:]
    num_kv_heads, num_keys = k.shape[1:3]
    # Query head i reads key/value head i // G, in one batched matrix product.
    q = q.reshape(-1, batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q = jnp.transpose(q, (1, 3, 0, 4, 2, 5)).reshape(batch, num_kv_heads, -1, head_dim)
    scores = product(q.astype(k.dtype), k) * head_dim**-0.5
    scores = scores.reshape(batch, num_kv_heads, -1, num_heads // num_kv_heads, num_queries, num_keys)
    if not spec.chunk_length:
        return scores[:, :, 0]
    back = jnp.broadcast_to(spec.chunks_back(num_queries, num_keys)[:, None, None], scores[:, :, 0].shape)
    return lax.select_n(back, *(scores[:, :, i] for i in range(3)))


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Values [B, K, S, h] summed with weights [B, K, G, T, S]: float32 [B, K, G, T, h]."""
    flat = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    out = jnp.einsum("bkqs,bksh->bkqh", flat, v, preferred_element_type=jnp.float32)
    return out.reshape(*weights.shape[:-1], v.shape[-1])


def _normalised(out: jax.Array, total: jax.Array, largest: jax.Array, dtype: DTypeLike) -> Attended:
    """[B, T, H, h] and the log-sum-exp [B, H, T] of summed values [B, K, G, T, h], weights and largest scores."""
    out = jnp.transpose(out / total[..., None], (0, 3, 1, 2, 4))
    lse = (largest + jnp.log(total)).reshape(out.shape[0], -1, out.shape[1])
    return out.reshape(*out.shape[:2], -1, out.shape[-1]).astype(dtype), lse
