"""What an attention sees, as data."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


class AttentionSpec(flax.struct.PyTreeNode):
    """Which of S keys each of T queries sees.

    Query i stands at place `start` + i of its row and key j at place `key_start` + j. A place counts the row's tokens
    from its beginning; it is neither a rotary position nor a slot of a cache.
    """

    start: jax.Array | int = 0  # of all rows, or [B]
    key_start: jax.Array | int = 0
    query_segments: jax.Array | None = None  # [B, T]: a query sees keys of its own segment only
    key_segments: jax.Array | None = None  # [B, S]
    window: jax.Array | int | None = None  # keys up to the query's own that it sees, itself included
    causal: bool = flax.struct.field(pytree_node=False, default=True)  # no key at a later place than the query's
    # Dual Chunk Attention: tokens per chunk. Queries then come as three, for keys 0, 1, and 2 or more chunks back.
    chunk_length: int | None = flax.struct.field(pytree_node=False, default=None)
    # numbers of the chunks where they are not counted from the beginning of the row: [B, T] and [B, S]
    query_chunks: jax.Array | None = None
    key_chunks: jax.Array | None = None

    @property
    def from_beginning(self) -> bool:
        """Whether both queries and keys are known to be a row's first, so that the new tokens are all there is."""
        return all(isinstance(x, int) and x == 0 for x in (self.start, self.key_start))

    def mask(self, num_queries: int, num_keys: int) -> jax.Array:
        """bool [1 or B, T, S]."""
        query, key = _places(self.start, num_queries)[:, :, None], _places(self.key_start, num_keys)[:, None, :]
        seen = key <= query if self.causal else jnp.ones((1, num_queries, num_keys), bool)
        if self.query_segments is not None and self.key_segments is not None:
            seen &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.window is not None:
            seen &= key > query - self.window
        return seen

    def chunks_back(self, num_queries: int, num_keys: int) -> jax.Array:
        """int [1 or B, T, S]: which of the three queries a key is read by."""
        assert self.chunk_length
        query, key = self.query_chunks, self.key_chunks
        if query is None or key is None:
            query = _places(self.start, num_queries) // self.chunk_length
            key = _places(self.key_start, num_keys) // self.chunk_length
        return jnp.clip(query[:, :, None] - key[:, None, :], 0, 2)

    def of_queries(self, begin: Any, size: int) -> AttentionSpec:
        """For `size` queries from number `begin` on."""
        return self.replace(
            start=self.start + begin,
            query_segments=_cut(self.query_segments, begin, size),
            query_chunks=_cut(self.query_chunks, begin, size),
        )

    def of_query(self, index: jax.Array) -> AttentionSpec:
        """For query number `index` [B] of each row alone."""

        def take(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else jnp.take_along_axis(x, index[:, None], axis=1)

        return self.replace(
            start=self.start + index,
            query_segments=take(self.query_segments),
            query_chunks=take(self.query_chunks),
        )

    def of_keys(self, begin: Any, size: int) -> AttentionSpec:
        """For `size` keys from number `begin` on."""
        return self.replace(
            key_start=self.key_start + begin,
            key_segments=_cut(self.key_segments, begin, size),
            key_chunks=_cut(self.key_chunks, begin, size),
        )


def _places(start: jax.Array | int, count: int) -> jax.Array:
    """int32 [1 or B, count]."""
    return jnp.asarray(start, jnp.int32).reshape(-1, 1) + jnp.arange(count, dtype=jnp.int32)[None]


def _cut(x: jax.Array | None, begin: Any, size: int) -> jax.Array | None:
    return None if x is None else lax.dynamic_slice_in_dim(x, begin, size, axis=1)
