"""Sparse prefill of Qwen2.5-1M: each head reads the columns and diagonals that a prompt's last queries find important.

MInference's vertical-slash pattern (arXiv 2407.02490), with Dual Chunk Attention as the Qwen2.5-1M report describes.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.config import SparsePrefill
from qwen_jax.kernels.spec import AttentionSpec

# A diagonal is read for so many queries at a time, and brings as many keys for each of them.
BLOCK = 64
# Selected keys that are gathered at once.
GATHERED = 512
# Queries that choose, and what is always read: the first columns and the nearest diagonals.
LAST_QUERIES, FIRST_COLUMNS, NEAREST_DIAGONALS = 64, 30, 100
FEWEST_DIAGONALS = 50


class SparseBudget(flax.struct.PyTreeNode):
    """How many columns and diagonals each head of one layer, or of all, reads."""

    vertical: jax.Array  # [(L,) H] int32
    slash: jax.Array  # [(L,) H] int32
    last: jax.Array  # [B] int32, index of the last query that is no padding
    rows: jax.Array  # [B] bool, False where a row reads everything
    max_vertical: int = flax.struct.field(pytree_node=False)
    max_slash: int = flax.struct.field(pytree_node=False)

    def of_layer(self, layer: jax.Array | int) -> "SparseBudget":
        return self.replace(vertical=self.vertical[layer], slash=self.slash[layer])


def sparse_budgets(sparse: SparsePrefill, lengths: jax.Array, start: jax.Array | int, num_queries: int) -> SparseBudget:
    """The budgets of all layers, for new tokens from place `start` on of sequences of true `lengths` [B].

    A sequence up to the threshold reads everything, whatever stands beside it.
    """
    vertical, slash = np.asarray(sparse.vertical, np.int32), np.asarray(sparse.slash, np.int32)
    last = jnp.clip(lengths - 1 - start, 0, num_queries - 1)
    # released budgets of 30 columns, the least, are read as 130 by released code
    vertical = np.where(vertical == FIRST_COLUMNS, 130, np.maximum(vertical, FIRST_COLUMNS))
    slash = np.maximum(slash, FEWEST_DIAGONALS)
    rows = lengths > sparse.threshold
    return SparseBudget(jnp.asarray(vertical), jnp.asarray(slash), last, rows, int(vertical.max()), int(slash.max()))


def sparse_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, budget: SparseBudget
) -> tuple[jax.Array, jax.Array]:
    """`attend_lse` within the budget of one layer, over a cache's keys; exact softmax over what is read.

    q [B, T, H, h], or [5, B, T, H, h] under Dual Chunk Attention: the three that attend and the two that choose in
    place of the second and third, at unclamped positions. exp of the difference between this log-sum-exp and full
    attention's is the share of attention that was read.
    """
    shape, num_kv_heads = q.shape[-4:], k.shape[1]
    (batch, num_queries, num_heads, head_dim), groups = shape, shape[2] // num_kv_heads
    variants = q.reshape(-1, *shape)
    readers, choosers = variants[:3], jnp.concatenate([variants[:1], variants[3:]])
    padding = [(0, 0), (0, 0), (0, -num_queries % BLOCK), (0, 0), (0, 0)]
    readers = jnp.pad(readers, padding)
    start = jnp.broadcast_to(jnp.asarray(spec.start, jnp.int32), (batch,))
    positions = start[:, None] + jnp.arange(readers.shape[2])[None]  # [B, T]
    first = jnp.clip(budget.last - LAST_QUERIES + 1, 0, max(num_queries - LAST_QUERIES, 0))  # [B]
    chosen_by = first[:, None] + jnp.arange(min(LAST_QUERIES, num_queries))[None]  # [B, n]

    def of_head(row: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys, values = k[row, head // groups], v[row, head // groups]
        at = chosen_by[row]
        columns, diagonals = choose(
            choosers[:, row, at, head],
            keys,
            positions[row, at],
            at <= budget.last[row],
            spec.chunk_length,
            budget.vertical[head],
            budget.slash[head],
            budget.max_vertical,
            budget.max_slash,
        )
        columns |= ~budget.rows[row]
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(diagonals)])  # diagonals below each offset

        def block(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = lax.dynamic_slice_in_dim(readers[:, row, :, head], index * BLOCK, BLOCK, axis=1)
            at = lax.dynamic_slice_in_dim(positions[row], index * BLOCK, BLOCK)
            return _read(rows, keys, values, at, columns, before, spec.chunk_length)

        out, lse = lax.map(block, jnp.arange(readers.shape[2] // BLOCK))
        return out.reshape(-1, head_dim)[:num_queries], lse.reshape(-1)[:num_queries]

    def of_rows(head: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(lambda row: of_head(row, head))(jnp.arange(batch))

    out, lse = lax.map(of_rows, jnp.arange(num_heads))  # [H, B, T, ...]
    return jnp.moveaxis(out, 0, 2).astype(q.dtype), jnp.swapaxes(lse, 0, 1)


def choose(
    q: jax.Array,
    k: jax.Array,
    positions: jax.Array,
    is_token: jax.Array,
    chunk_length: int | None,
    vertical: jax.Array,
    slash: jax.Array,
    max_vertical: int,
    max_slash: int,
) -> tuple[jax.Array, jax.Array]:
    """Which columns (by key) and diagonals (by distance) one head reads, bool [S] each, from queries [1 or 3, n, h].

    A column's score is the attention that it gets of all n queries, a diagonal's what lies along it.
    """
    num_keys = k.shape[0]
    slots = jnp.arange(num_keys)
    scores = jnp.where(slots[None] <= positions[:, None], _scores(q, k, positions, slots, chunk_length), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1) * is_token[:, None]
    along = positions[:, None] - slots[None]  # the key at each distance
    diagonals = jnp.where(along >= 0, jnp.take_along_axis(weights, jnp.maximum(along, 0), axis=-1), 0.0)

    def largest(score: jax.Array, always: int, count: jax.Array, most: int) -> jax.Array:
        most = min(most, num_keys)
        found = lax.top_k(jnp.where(slots < always, jnp.inf, score), most)[1]
        return jnp.zeros(num_keys, bool).at[found].set(jnp.arange(most) < count)

    columns = largest(jnp.sum(weights, axis=0), FIRST_COLUMNS, vertical, max_vertical)
    return columns, largest(jnp.sum(diagonals, axis=0), NEAREST_DIAGONALS, slash, max_slash)


def _read(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    columns: jax.Array,
    before: jax.Array,
    chunk_length: int | None,
) -> tuple[jax.Array, jax.Array]:
    """One head's block of queries [1 or 3, BLOCK, h] over the selected keys, gathered: [BLOCK, h], lse [BLOCK]."""
    num_keys, head_dim = k.shape
    distance = positions[0] - jnp.arange(num_keys)  # of the block's first query
    # a diagonal at distance d brings the keys that it crosses in this block: those d back from any of its queries
    crossed = before[jnp.clip(distance + BLOCK, 0, num_keys)] > before[jnp.clip(distance, 0, num_keys)]
    selected = (crossed | columns) & (distance > -BLOCK)
    keys = jnp.nonzero(selected, size=num_keys + GATHERED, fill_value=2**30)[0]
    lowest = jnp.finfo(jnp.float32).min

    def gather(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, total, largest = carry
        slots = lax.dynamic_slice_in_dim(keys, i * GATHERED, GATHERED)
        seen = slots[None] <= positions[:, None]
        at = jnp.minimum(slots, num_keys - 1)
        scores = jnp.where(seen, _scores(q, k[at], positions, slots, chunk_length), lowest)
        highest = jnp.maximum(largest, jnp.max(scores, axis=-1))
        shrink, weights = jnp.exp(largest - highest), jnp.where(seen, jnp.exp(scores - highest[:, None]), 0.0)
        found = jnp.einsum("qs,sh->qh", weights.astype(v.dtype), v[at], preferred_element_type=jnp.float32)
        return out * shrink[:, None] + found, total * shrink + jnp.sum(weights, axis=-1), highest

    count = (jnp.sum(selected) + GATHERED - 1) // GATHERED
    start = (jnp.zeros((BLOCK, head_dim)), jnp.zeros(BLOCK), jnp.full(BLOCK, lowest))
    out, total, largest = lax.fori_loop(0, count, gather, start)
    total = jnp.where(total == 0, 1.0, total)
    return out / total[:, None], largest + jnp.log(total)


def _scores(q: jax.Array, k: jax.Array, positions: jax.Array, slots: jax.Array, chunk_length: int | None) -> jax.Array:
    """float32 [T, S] of queries [1 or 3, T, h] and keys [S, h] of one head, before the mask."""
    scores = jnp.einsum("vqh,sh->vqs", q.astype(k.dtype), k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if not chunk_length:
        return scores[0]
    back = jnp.clip((positions // chunk_length)[:, None] - (slots // chunk_length)[None], 0, 2)
    return lax.select_n(back, *scores)
