"""Attention: what may be seen as data, the plain computation, and the layer around it."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from qwen_jax.backend import Backend, current_backend
from qwen_jax.cache import Cache
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.layers.linear import Linear, residual_std
from qwen_jax.layers.norm import RMSNorm
from qwen_jax.layers.rope import Rotary, rotate
from qwen_jax.layers.sharded_attention import repeat_heads, sharded_attention
from qwen_jax.layers.sparse import SparseBudget, sparse_attention
from qwen_jax.sharding import constrain, current_mesh

# Long prompts attend in blocks of queries, which bounds the [B, H, T, S] scores that the plain computation holds.
QUERY_BLOCK = 512
# Shorter ones in at most this many blocks, of at least this many queries, each reading only the keys up to its end.
CAUSAL_BLOCKS, SMALLEST_BLOCK = 8, 64
# Several queries over a cache, as in prefill by pieces, read this many keys at a time.
KEY_BLOCK = 512


class AttentionSpec(flax.struct.PyTreeNode):
    """Which keys a query sees: not later ones, of its own segment, and within the window (in keys, itself included)."""

    query_positions: jax.Array  # [B, T]
    key_positions: jax.Array  # [B, S]
    query_segments: jax.Array | None = None  # [B, T]
    key_segments: jax.Array | None = None  # [B, S]
    window: jax.Array | int | None = None
    # Key `offset + i` is query i's own token, so that no query sees a key further along; int, or [B]. None: unknown.
    offset: jax.Array | int | None = None
    # Dual Chunk Attention: tokens per chunk. Queries then come as three, for keys 0, 1, and 2 or more chunks back.
    chunk_length: int | None = flax.struct.field(pytree_node=False, default=None)
    # Several queries over a cache read only what this allows, see `sparse_attention`.
    sparse: SparseBudget | None = None

    def mask(self) -> jax.Array:
        """bool [B, T, S]."""
        query, key = self.query_positions[:, :, None], self.key_positions[:, None, :]
        seen = key <= query
        if self.query_segments is not None and self.key_segments is not None:
            seen &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.window is not None:
            seen &= key > query - self.window
        return seen

    def chunks_back(self) -> jax.Array:
        """int [B, T, S]: which of the three queries a key is read by."""
        assert self.chunk_length
        query, key = self.query_positions // self.chunk_length, self.key_positions // self.chunk_length
        return jnp.clip(query[:, :, None] - key[:, None, :], 0, 2)

    def block(self, start: int, stop: int) -> "AttentionSpec":
        """For queries [start, stop) and the keys before `stop`."""
        queries, keys = slice(start, stop), slice(0, stop)
        return self.replace(
            query_positions=self.query_positions[:, queries],
            key_positions=self.key_positions[:, keys],
            query_segments=None if self.query_segments is None else self.query_segments[:, queries],
            key_segments=None if self.key_segments is None else self.key_segments[:, keys],
        )


def attention(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> jax.Array:
    """softmax(q k^T / sqrt(h)) v with float32 scores; q [B, T, H, h], k and v [B, K, S, h] as caches hold them.

    With `spec.chunk_length`, q is [3, B, T, H, h]: every query as it is turned toward keys of its own chunk, of the one
    before, and of earlier ones (Dual Chunk Attention, arXiv 2402.17463), in one softmax. Returns [B, T, H, h] in q's
    dtype. On a mesh every device attends with its own rows, heads and part of the sequence.
    """
    mesh = current_mesh()
    if mesh is not None and spec.sparse is not None:
        raise InputError(
            "sparse prefill does not run on a mesh; use one device, or set sparse_attention_enabled to false."
        )
    return attend(q, k, v, spec)[0] if mesh is None else sharded_attention(attend, q, k, v, spec, mesh)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """`attention` on one device, and the log-sum-exp of the scores, float32 [B, H, T], by which parts are merged.

    The one place where an implementation is chosen: a kernel where the platform has one for these shapes.
    """
    num_queries, num_keys = q.shape[-3], k.shape[2]
    if 1 < num_queries and spec.sparse is not None and spec.window is None:
        return sparse_attention(q, k, v, spec)
    if kernel := _kernel(q, spec, current_backend()):
        return kernel(q, k, v)
    among_themselves = isinstance(spec.offset, int) and spec.offset == 0
    if 1 < num_queries and KEY_BLOCK < num_keys and not among_themselves:
        return _attend_by_key_blocks(q, k, v, spec)
    if among_themselves and num_queries <= CAUSAL_BLOCKS * QUERY_BLOCK:
        size = max(SMALLEST_BLOCK, -(-num_queries // CAUSAL_BLOCKS))
        parts = [
            plain_attention(
                q[..., i : i + size, :, :], k[:, :, : i + size], v[:, :, : i + size], spec.block(i, i + size)
            )
            for i in range(0, num_queries, size)
        ]
        out = checkpoint_name(jnp.concatenate([out for out, _ in parts], axis=1), "attention")
        return out, jnp.concatenate([lse for _, lse in parts], axis=2)
    if num_queries <= QUERY_BLOCK or num_queries % QUERY_BLOCK:
        return plain_attention(q, k, v, spec)

    def blocks(x: jax.Array | None, axis: int = 1) -> jax.Array | None:
        if x is None:
            return None
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, QUERY_BLOCK, *x.shape[axis + 1 :]), axis, 0)

    def one(block: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        query, positions, segments = block
        return plain_attention(query, k, v, spec.replace(query_positions=positions, query_segments=segments))

    out, lse = lax.map(one, (blocks(q, q.ndim - 3), blocks(spec.query_positions), blocks(spec.query_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[-4:]), jnp.moveaxis(lse, 0, 2).reshape(*lse.shape[1:3], -1)


def _kernel(q: jax.Array, spec: AttentionSpec, backend: Backend) -> Callable[..., tuple[jax.Array, jax.Array]] | None:
    """The kernel for these queries; None: attention in plain jnp."""
    offset = spec.offset
    if backend.kernels == "cpu" or offset is None or q.shape[-1] not in (64, 128):
        return None
    if spec.chunk_length and spec.query_segments is not None:
        return None  # the kernels' chunks begin with the row, those of packed documents with the document
    packed = spec.query_segments is not None and spec.key_segments is not None
    segments = (spec.query_segments, spec.key_segments) if packed else (None, None)
    known: dict[str, Any] = {"window": spec.window, "chunk_length": spec.chunk_length, "interpret": backend.interpret}
    if backend.kernels == "tpu" and q.shape[-3] == 1 and not packed:
        from qwen_jax.kernels.decode import decode_attention

        def decode(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            lengths = spec.query_positions[:, 0] + 1
            out = decode_attention(q[..., 0, :, :], k, v, lengths, splits=backend.cores, **known)
            return out[:, None], jnp.zeros((*out.shape[:2], 1))  # nothing is merged with it

        return decode
    if backend.kernels == "gpu" and q.shape[-3] == 1 and not packed:
        from qwen_jax.kernels import decode_gpu

        def decode_on_gpu(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            lengths = jnp.broadcast_to(offset, q.shape[-4]) + 1
            out, lse = decode_gpu.decode_attention(q[..., 0, :, :], k, v, lengths, **known)
            return out[:, None], lse[:, :, None]

        return decode_on_gpu
    if backend.kernels == "gpu":
        from qwen_jax.kernels.flash_gpu import flash_attention_lse
    elif isinstance(spec.window, jax.Array):
        return None  # layers in a scan whose windows differ
    else:
        from qwen_jax.kernels.flash import flash_attention_lse
    return functools.partial(
        flash_attention_lse,
        query_segments=segments[0],
        key_segments=segments[1],
        query_offset=spec.offset,
        **known,
    )


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """`attend` as the formula has it, all scores at once: what every other implementation must equal."""
    scores = jnp.where(spec.mask()[:, None, None], _scores(q, k, spec), jnp.finfo(jnp.float32).min)
    largest = lax.stop_gradient(jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - largest[..., None]).astype(v.dtype)  # rounded before the sum, which is theirs
    total = jnp.sum(weights, axis=-1, dtype=jnp.float32)
    # normalised after the second product, which has fewer elements than the weights
    return _normalised(_weighted(weights, v), total, largest, q.dtype)


def _attend_by_key_blocks(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """As `plain_attention`, with a running softmax in memory that does not grow with S; skips what no query sees."""
    (batch, num_queries, num_heads, head_dim), (num_kv_heads, num_keys) = q.shape[-4:], k.shape[1:3]
    key_positions = jnp.broadcast_to(spec.key_positions, (batch, num_keys))
    last = jnp.max(spec.query_positions)
    before = -1 if spec.window is None else jnp.min(spec.query_positions) - spec.window

    def block(carry: tuple[jax.Array, jax.Array, jax.Array], begin: jax.Array) -> tuple[Any, None]:
        start = jnp.minimum(begin, num_keys - KEY_BLOCK)  # the last block reaches back where S is no multiple

        def cut(x: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start, KEY_BLOCK, axis)

        here = spec.replace(
            key_positions=cut(key_positions, 1),
            key_segments=None if spec.key_segments is None else cut(spec.key_segments, 1),
        )

        def read(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            out, total, largest = carry
            is_new = start + jnp.arange(KEY_BLOCK) >= begin
            seen = (here.mask() & is_new[None, None])[:, None, None]  # [B, 1, 1, T, S]
            scores = jnp.where(seen, _scores(q, cut(k, 2), here), jnp.finfo(jnp.float32).min)
            highest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            shrink = jnp.exp(largest - highest)
            weights = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0.0).astype(v.dtype)
            out = out * shrink[..., None] + _weighted(weights, cut(v, 2))
            return out, total * shrink + jnp.sum(weights, axis=-1, dtype=jnp.float32), highest

        in_sight = (jnp.min(here.key_positions) <= last) & (jnp.max(here.key_positions) > before)
        return lax.cond(in_sight, read, lambda carry: carry, carry), None

    shape = (batch, num_kv_heads, num_heads // num_kv_heads, num_queries)
    start = (jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, jnp.finfo(jnp.float32).min))
    (out, total, largest), _ = lax.scan(block, start, jnp.arange(0, num_keys, KEY_BLOCK))
    # of a device's part of a cache a query may see nothing
    return _normalised(out, jnp.where(total == 0, 1.0, total), largest, q.dtype)


def _scores(q: jax.Array, k: jax.Array, spec: AttentionSpec) -> jax.Array:
    """float32 [B, K, G, T, S] before the mask."""
    batch, num_queries, num_heads, head_dim = q.shape[-4:]
    num_kv_heads, num_keys = k.shape[1:3]
    # Query head i reads key/value head i // G, in one batched matrix product.
    q = q.reshape(-1, batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q = jnp.transpose(q, (1, 3, 0, 4, 2, 5)).reshape(batch, num_kv_heads, -1, head_dim)
    q = q.astype(k.dtype)
    if num_queries == 1 and current_backend().kernels == "cpu":
        # few rows stand right of the product, as in `project`; without the barrier XLA:CPU turns it round again
        scores = jnp.einsum("bksh,bkqh->bksq", k, q, preferred_element_type=jnp.float32)
        scores = jnp.swapaxes(lax.optimization_barrier(scores), 2, 3)
    else:
        scores = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32)
    scores *= head_dim**-0.5
    scores = scores.reshape(batch, num_kv_heads, -1, num_heads // num_kv_heads, num_queries, num_keys)
    if not spec.chunk_length:
        return scores[:, :, 0]
    back = jnp.broadcast_to(spec.chunks_back()[:, None, None], scores[:, :, 0].shape)
    return lax.select_n(back, *(scores[:, :, i] for i in range(3)))


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Values [B, K, S, h] summed with weights [B, K, G, T, S]: float32 [B, K, G, T, h]."""
    flat = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    out = jnp.einsum("bkqs,bksh->bkqh", flat, v, preferred_element_type=jnp.float32)
    return out.reshape(*weights.shape[:-1], v.shape[-1])


def _normalised(out: jax.Array, total: jax.Array, largest: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """[B, T, H, h] and the log-sum-exp [B, H, T] of summed values [B, K, G, T, h], weights and largest scores."""
    out = jnp.transpose(out / total[..., None], (0, 3, 1, 2, 4))
    lse = (largest + jnp.log(total)).reshape(out.shape[0], -1, out.shape[1])
    return out.reshape(*out.shape[:2], -1, out.shape[-1]).astype(dtype), lse


def take_token(tree: Any, index: jax.Array | None) -> Any:
    """Token `index` [B] of every array [B, T, ...] in `tree`, as [B, 1, ...]; without an index, the tree."""
    if index is None:
        return tree
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1), tree)


class Attention(nn.Module):
    """Projections, rotation, attention over the new keys or over the cache, and the output projection."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotary: Rotary,
        spec: AttentionSpec,
        cache: Cache | None,
        layer: jax.Array | int,
        only: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], Cache | None]:
        """x [B, T, D] -> (y [B, T, D], the new rotated keys and values [B, K, T, h], the cache with them).

        With `only` [B], the one query of each row that is wanted, y is [B, 1, D].
        """
        c = self.config

        def heads(x: jax.Array, name: str, num: int, axis: str) -> jax.Array:
            shape, axes = (num, c.head_dim), (axis, "head_dim")
            y = Linear(shape, (c.hidden_size,), axes, ("embed",), c.qkv_bias, c.initializer_range, name=name)(x)
            return constrain(y, "batch", "sequence", axis, None)

        q = heads(take_token(x, only), "q", c.num_heads, "heads")  # [B, T, H, h]
        k = heads(x, "k", c.num_kv_heads, "kv_heads")  # [B, T, K, h]
        v = heads(x, "v", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, "head_dim", name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, "head_dim", name="k_norm")(k)
        turns = rotary.query if only is None else rotary.query[:3]  # those that choose are of no use to a single query
        queries = [rotate(q, tables) for tables in take_token(turns, only)]
        q = jnp.stack(queries) if spec.chunk_length else queries[0]
        k = rotate(k, rotary.key)
        k, v = (jnp.swapaxes(repeat_heads(new), 1, 2) for new in (k, v))  # [B, K, T, h]
        keys, values = k, v
        if cache is not None:
            cache, keys, values = cache.append(layer, k, v, spec.query_positions)
        if only is not None:
            positions, segments = take_token((spec.query_positions, spec.query_segments), only)
            spec = spec.replace(query_positions=positions, query_segments=segments, offset=None)
        out = constrain(attention(q, keys, values, spec), "batch", "sequence", "heads", None)
        std = residual_std(c.initializer_range, c.num_layers) if c.model_type == "qwen" else c.initializer_range
        project_out = Linear(
            (c.hidden_size,), (c.num_heads, c.head_dim), ("embed",), ("heads", "head_dim"), std=std, name="o"
        )
        return project_out(out), (k, v), cache
