"""Attention of one query a sequence over a long cache, contiguous or paged, for NVIDIA GPUs through Pallas and Triton.

Flash-decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html): a sequence's keys are shared out over
programs, so that few sequences keep all of a GPU reading, and their parts are merged by the logarithms of their sums.
"""

import functools
from collections.abc import Callable
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
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(h)) v of each sequence's last token over its first `lengths` keys, and the log-sum-exp.

    q [B, H, h], k and v [B, K, S, h], h a power of two, lengths [B] int32 -> (out [B, H, h] in q's dtype, float32
    [B, H], natural logarithm); a row of no keys gives zeros. `window`: only the last so many keys. With `chunk_length`
    (Dual Chunk Attention, arXiv 2402.17463) q is [3, B, H, h], rotated for keys of the same chunk, of the one before
    and of earlier ones. int8 k and v come with k_scale and v_scale, float32 [B, K, S]. `splits`: programs that share a
    sequence's keys; default as many as fill the GPU. Raises InputError for shapes that do not fit each other.
    """
    batch, kv_heads, capacity, width = k.shape
    block = _block(width, capacity)

    def fetch(at: Any, keys: jax.Array, seen: jax.Array, refs: tuple[Any, ...]) -> list[jax.Array]:
        k_ref, v_ref, *scale_refs = refs
        rows = [triton.load(ref.at[at, :], mask=seen[:, None], other=0) for ref in (k_ref, v_ref)]
        return rows + [triton.load(ref.at[at], mask=seen, other=0) for ref in scale_refs]

    # beyond the last key where it ends within a block, which the mask keeps from being read
    padded = pl.cdiv(capacity, block) * block
    of_rows = pl.BlockSpec((None, None, padded, width), lambda i, h, b: (b, h, 0, 0))
    of_scales = pl.BlockSpec((None, None, padded), lambda i, h, b: (b, h, 0))
    scales = _scales(k, k_scale, v_scale, k.shape[:-1])
    operands = [(k, of_rows), (v, of_rows), *((scale, of_scales) for scale in scales)]
    return _attend(
        q, k, v, lengths, kv_heads, capacity, block, operands, fetch, window, chunk_length, splits, interpret
    )


def paged_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    lengths: jax.Array,
    page_tables: jax.Array,
    *,
    window: jax.Array | int | None = None,
    chunk_length: int | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`decode_attention` over pages [K, N, P, h] of any size, int8 ones with scales [N, K, P].

    Token p of sequence b lies in slot p % P of page page_tables[b, p // P] (int32 [B, max_pages]); entries beyond a
    sequence's length are not used.
    """
    kv_heads, num_pages, page, width = k_pages.shape
    capacity = page_tables.shape[1] * page
    block = _block(width, capacity)

    def fetch(at: Any, keys: jax.Array, seen: jax.Array, refs: tuple[Any, ...]) -> list[jax.Array]:
        table_ref, k_ref, v_ref, *scale_refs = refs
        ids = triton.load(table_ref.at[lax.div(keys, jnp.int32(page))], mask=seen, other=0)
        slots = lax.rem(keys, jnp.int32(page))
        where = tuple(
            jnp.broadcast_to(x, (block, width)) for x in (ids[:, None], slots[:, None], jnp.arange(width)[None])
        )
        rows = [triton.load(ref.at[where], mask=seen[:, None], other=0) for ref in (k_ref, v_ref)]
        return rows + [triton.load(ref.at[ids, slots], mask=seen, other=0) for ref in scale_refs]

    of_rows = pl.BlockSpec((None, num_pages, page, width), lambda i, h, b: (h, 0, 0, 0))
    of_scales = pl.BlockSpec((num_pages, None, page), lambda i, h, b: (0, h, 0))
    scales = _scales(k_pages, k_scale, v_scale, (num_pages, kv_heads, page))
    operands = [
        (page_tables.astype(jnp.int32), pl.BlockSpec((None, page_tables.shape[1]), lambda i, h, b: (b, 0))),
        (k_pages, of_rows),
        (v_pages, of_rows),
        *((scale, of_scales) for scale in scales),
    ]
    return _attend(
        q,
        k_pages,
        v_pages,
        lengths,
        kv_heads,
        capacity,
        block,
        operands,
        fetch,
        window,
        chunk_length,
        splits,
        interpret,
    )


def _block(width: int, capacity: int) -> int:
    return min(BLOCKS[64 if width <= 64 else 128], max(16, pl.next_power_of_2(capacity)))


def _scales(
    k: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None, shape: tuple[int, ...]
) -> list[jax.Array]:
    scales = [scale for scale in (k_scale, v_scale) if scale is not None]
    if len(scales) != (2 if k.dtype == jnp.int8 else 0):
        raise InputError(f"k and v are {k.dtype}; int8 needs k_scale and v_scale, and only int8 takes them.")
    for scale in scales:
        if scale.shape != shape:
            raise InputError(f"A scale has the shape {scale.shape}; expected {shape}, one for each key and head.")
    return scales


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    kv_heads: int,
    capacity: int,
    block: int,
    operands: list[tuple[jax.Array, pl.BlockSpec]],
    fetch: Callable[..., list[jax.Array]],
    window: jax.Array | int | None,
    chunk_length: int | None,
    splits: int | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Over keys 0 to `capacity`, of which `fetch` gives k, v and any scales of one block."""
    if q.ndim != (4 if chunk_length else 3) or (chunk_length and q.shape[0] != 3):
        wanted = "[3, B, H, h] with chunk_length" if chunk_length else "[B, H, h] without chunk_length"
        raise InputError(f"q has the shape {q.shape}; it must be {wanted}.")
    q = q if chunk_length else q[None]
    variants, batch, heads, width = q.shape
    if k.shape != v.shape or k.dtype != v.dtype or k.shape[-1] != width or len(lengths) != batch:
        raise InputError(f"k {k.dtype}{k.shape} and v {v.dtype}{v.shape} must be alike and fit q {q.shape}.")
    if heads % kv_heads:
        raise InputError(f"q has {heads} heads, k and v {kv_heads}; q's must be a multiple of theirs.")
    if width < 16 or width & (width - 1):
        raise InputError(f"Heads are {width} wide; Triton takes powers of two from 16.")
    if splits is None:
        splits = max(1, min(pl.cdiv(PROGRAMS, batch * kv_heads), capacity // FEWEST_KEYS))
    groups = heads // kv_heads
    rows = max(ROWS, pl.next_power_of_2(groups))
    dtype = q.dtype
    q = q if k.dtype == jnp.int8 else q.astype(k.dtype)
    q = q.reshape(variants, batch, kv_heads, groups, width)
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, rows - groups), (0, 0)])
    lengths = jnp.minimum(lengths, capacity).astype(jnp.int32)
    window = jnp.minimum(capacity if window is None else window, capacity)
    starts = jnp.maximum(lengths - jnp.asarray(window, jnp.int32), 0)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, block, chunk_length, width**-0.5 * LOG2_E, fetch),
        grid=(splits, kv_heads, batch),
        in_specs=[
            pl.BlockSpec((batch, 2), lambda i, h, b: (0, 0)),
            pl.BlockSpec((variants, None, None, rows, width), lambda i, h, b: (0, b, h, 0, 0)),
            *(spec for _, spec in operands),
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
    )(jnp.stack([starts, lengths], axis=1), q, *(operand for operand, _ in operands))
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
    fetch: Callable[..., list[jax.Array]],
    ends_ref: Any,
    q_ref: Any,
    *refs: Any,
) -> None:
    *operand_refs, out_ref, lse_ref = refs
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
            k, v, *scales = fetch(pl.ds(j * block, block), keys, seen, tuple(operand_refs))
            scores = dot(q, k.astype(q.dtype), 1, 1) * scale
            if scales:
                scores = scores * scales[0][None]
            scores = jnp.where(seen[None], scores, HIDDEN)
            now = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights, kept = jnp.exp2(scores - now[:, None]), jnp.exp2(highest - now)
            total = total * kept + jnp.sum(weights, axis=1)
            weights = weights * scales[1][None] if scales else weights
            acc = acc * kept[:, None] + dot(weights.astype(q.dtype), v.astype(q.dtype), 1, 0)
            return acc, now, total

        stop_block = jnp.where(high > low, lax.div(high - 1, jnp.int32(block)) + 1, 0)
        carry = lax.fori_loop(lax.div(low, jnp.int32(block)), stop_block, step, carry)
    acc, highest, total = carry
    some = total > 0
    total = jnp.where(some, total, 1)
    triton.store(lse_ref, jnp.where(some, highest + jnp.log2(total), NOTHING))
    triton.store(out_ref, acc / total[:, None])
