"""Attention of one query a sequence over a long cache, for NVIDIA GPUs through Pallas and Triton.

Flash-decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html): a sequence's keys are shared out over
programs, so that few sequences keep all of a GPU reading, and their parts are merged by the logarithms of their sums.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.errors import InputError
from qwen_jax.kernels.gpu import HIDDEN, LOG2_E, NOTHING, dot

# Keys read at a time: of wider heads fewer, so that two programs share a core's memory.
BLOCKS = {64: 128, 128: 64}
WARPS, STAGES = 4, 3
# Programs that keep an H100's 132 cores reading, and the fewest keys worth a program.
PROGRAMS, FEWEST_KEYS = 512, 256
# Rows of a product on the matrix units.
ROWS = 16


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    window: jax.Array | int | None = None,
    chunk_length: int | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(h)) v of each sequence's last token over its first `lengths` keys, and the log-sum-exp.

    q [B, H, h], k and v [B, K, S, h], h a power of two, lengths [B] int32, at least 1 -> (out [B, H, h] in q's dtype,
    float32 [B, H], natural logarithm). `window`: only the last so many keys. With `chunk_length` (Dual Chunk Attention,
    arXiv 2402.17463) q is [3, B, H, h], rotated for keys of the same chunk, of the one before and of earlier ones.
    `splits`: programs that share a sequence's keys; default as many as fill the GPU. Raises InputError for shapes that
    do not fit each other.
    """
    if q.ndim != (4 if chunk_length else 3) or (chunk_length and q.shape[0] != 3):
        wanted = "[3, B, H, h] with chunk_length" if chunk_length else "[B, H, h] without chunk_length"
        raise InputError(f"q has the shape {q.shape}; it must be {wanted}.")
    q = q if chunk_length else q[None]
    variants, batch, heads, width = q.shape
    if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype or (k.shape[0], k.shape[3]) != (batch, width):
        raise InputError(f"k {k.dtype}{k.shape} and v {v.dtype}{v.shape} must be alike, [B, K, S, h], and fit q.")
    kv_heads, capacity = k.shape[1:3]
    if heads % kv_heads:
        raise InputError(f"q has {heads} heads, k and v {kv_heads}; q's must be a multiple of theirs.")
    if width < 16 or width & (width - 1):
        raise InputError(f"Heads are {width} wide; Triton takes powers of two from 16.")
    block = min(BLOCKS[64 if width <= 64 else 128], max(16, pl.next_power_of_2(capacity)))
    if splits is None:
        splits = max(1, min(pl.cdiv(PROGRAMS, batch * kv_heads), capacity // FEWEST_KEYS))
    groups = heads // kv_heads
    rows = max(ROWS, pl.next_power_of_2(groups))
    dtype = q.dtype
    q = q.astype(k.dtype).reshape(variants, batch, kv_heads, groups, width)
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, rows - groups), (0, 0)])
    lengths = jnp.minimum(lengths, capacity).astype(jnp.int32)
    window = jnp.minimum(capacity if window is None else window, capacity)
    starts = jnp.maximum(lengths - jnp.asarray(window, jnp.int32), 0)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, block, chunk_length, width**-0.5 * LOG2_E),
        grid=(splits, kv_heads, batch),
        in_specs=[
            pl.BlockSpec((batch, 2), lambda i, h, b: (0, 0)),
            pl.BlockSpec((variants, None, None, rows, width), lambda i, h, b: (0, b, h, 0, 0)),
            *[pl.BlockSpec((None, None, pl.cdiv(capacity, block) * block, width), lambda i, h, b: (b, h, 0, 0))] * 2,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, rows, width), lambda i, h, b: (i, b, h, 0, 0)),
            pl.BlockSpec((None, None, None, rows), lambda i, h, b: (i, b, h, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((splits, batch, kv_heads, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, kv_heads, rows), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="decode_attention",
    )(jnp.stack([starts, lengths], axis=1), q, k, v)
    out, lse = out[:, :, :, :groups], lse[:, :, :, :groups]
    highest = jnp.max(lse, axis=0, keepdims=True)
    weights = jnp.exp2(lse - highest)  # a program that had no key has the weight 0
    total = jnp.sum(weights, axis=0)
    out = jnp.sum(out * weights[..., None], axis=0) / total[..., None]
    lse = (highest[0] + jnp.log2(total)) / LOG2_E
    return out.reshape(batch, heads, width).astype(dtype), lse.reshape(batch, heads)


def _kernel(
    block: int,
    chunk_length: int | None,
    scale: float,
    ends_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
) -> None:
    split, batch = pl.program_id(0), pl.program_id(2)
    start, end = ends_ref[batch, 0], ends_ref[batch, 1]
    # whole blocks each, so that only the first and the last of a sequence are cut
    blocks = lax.div(end - 1, jnp.int32(block)) + 1 - lax.div(start, jnp.int32(block))
    share = lax.div(blocks + pl.num_programs(0) - 1, pl.num_programs(0)) * block
    first = lax.div(start, jnp.int32(block)) * block + split * share
    start, stop = jnp.maximum(start, first), jnp.minimum(end, first + share)
    spans = [(start, stop)]
    if chunk_length:
        own = lax.div(end - 1, jnp.int32(chunk_length)) * chunk_length
        before = jnp.maximum(own - chunk_length, 0)
        bounds = [(own, end), (before, own), (jnp.int32(0), before)]
        spans = [(jnp.maximum(start, low), jnp.minimum(stop, high)) for low, high in bounds]
    rows, width = q_ref.shape[1:]
    carry = (
        jnp.zeros((rows, width), jnp.float32),
        jnp.full((rows,), NOTHING, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    for variant, (low, high) in enumerate(spans):
        q = triton.load(q_ref.at[jnp.int32(variant)])

        def step(j: Any, carry: Any, low: Any = low, high: Any = high, q: Any = q) -> Any:
            acc, highest, total = carry
            keys = j * block + jnp.arange(block)
            seen = (keys >= low) & (keys < high)
            at = pl.ds(j * block, block)
            k, v = (triton.load(ref.at[at, :], mask=seen[:, None], other=0) for ref in (k_ref, v_ref))
            scores = jnp.where(seen[None], dot(q, k, 1, 1) * scale, HIDDEN)
            now = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights, kept = jnp.exp2(scores - now[:, None]), jnp.exp2(highest - now)
            acc = acc * kept[:, None] + dot(weights.astype(v.dtype), v, 1, 0)
            return acc, now, total * kept + jnp.sum(weights, axis=1)

        stop_block = jnp.where(high > low, lax.div(high - 1, jnp.int32(block)) + 1, 0)
        carry = lax.fori_loop(lax.div(low, jnp.int32(block)), stop_block, step, carry)
    acc, highest, total = carry
    some = total > 0
    total = jnp.where(some, total, 1)
    triton.store(lse_ref, jnp.where(some, highest + jnp.log2(total), NOTHING))
    triton.store(out_ref, acc / total[:, None])
