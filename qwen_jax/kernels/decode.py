"""Decode attention for TPU: one query token per sequence against a long cache, contiguous or paged.

The work of a ragged batch is one flat list of key blocks, so every step of the grid is a block that is needed: none is
spent beyond a sequence's length, and the next sequence's first block arrives while this one's last is in use.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError

LANES, SUBLANES = 128, 8
# What one step fetches of the keys: enough bytes to hide the cost of a step, few enough that VMEM holds two of each.
BLOCK_BYTES, LONGEST_BLOCK = 1 << 20, 1024
# Each page is a transfer of its own, and starting one takes scalar work.
PAGES_PER_STEP = 16
Block = tuple[tuple[Any, ...], Callable[..., tuple[Any, ...]]]  # a block's shape and its index map
UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    window: jax.Array | int | None = None,
    chunk_length: int | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    splits: int = 1,
    block: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(h)) v of each sequence's last token, [B, H, h] in q's dtype, with float32 accumulation.

    q [B, H, h]; k and v [B, K, S, h], or [L, B, K, S, h] of which only `layer` is read; lengths [B] int32 count the
    keys, the query's own included (a row of none gives zeros). A query sees its last `window` keys. With `chunk_length`
    C (Dual Chunk Attention, arXiv 2402.17463, section 3) q is [3, B, H, h], rotated for the keys of its own chunk, of
    the one before and of earlier ones. int8 k and v come with k_scale and v_scale, float32 [(L,) B, K, S]. `splits` is
    the number of cores that share a chip's memory (2 on v4 and v5p). `block`, the keys read at a time, is a multiple of
    128 that divides C. Raises InputError for arrays that do not fit together.
    """
    if layer is None:
        k, v = k[None], v[None]
        k_scale, v_scale = (None if x is None else x[None] for x in (k_scale, v_scale))
    _check(q, k, v, k_scale, v_scale, k.shape[:-1], chunk_length)
    num_kv_heads, capacity, head_dim = k.shape[-3:]
    block = block or _keys_per_step(num_kv_heads, k, capacity, chunk_length, LANES)
    if block % LANES or (chunk_length or 0) % block:
        raise InputError(
            f"block is {block}, chunk_length {chunk_length}; give a block that is a multiple of {LANES} and divides it."
        )

    def keys(*at: Any) -> tuple[Any, ...]:
        row, index = _place(*at)
        return at[2][LAYER], row, 0, index, 0

    return _attend(
        q,
        (k, v, k_scale, v_scale),
        [((None, None, num_kv_heads, block, head_dim), keys)],
        [((None, None, num_kv_heads, block), lambda *at: keys(*at)[:-1])],
        jnp.minimum(lengths, capacity),
        (),
        num_kv_heads=num_kv_heads,
        block=block,
        max_blocks=pl.cdiv(capacity, block),
        layer=layer,
        window=window,
        chunk_length=chunk_length,
        splits=splits,
        interpret=interpret,
    )


def paged_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    lengths: jax.Array,
    page_tables: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    window: jax.Array | int | None = None,
    chunk_length: int | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    splits: int = 1,
    pages_per_step: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`decode_attention` over pages: k_pages and v_pages [(L,) K, N, P, h], page_tables [B, max_pages] int32.

    Token p of sequence b lies in slot p % P of page page_tables[b, p // P]; entries beyond a sequence's length are not
    read. Heads come first so that a shard of them is one piece of memory, and tokens beside widths so that a page of a
    head is whole tiles. The scales of int8 pages are float32 [(L,) N, K, P]: a page of all heads is one tile. P is a
    multiple of 8 (16 in bfloat16, 32 in int8) and divides `chunk_length`. The tables lie in scalar memory: keep
    B * max_pages below 2^17.
    """
    if layer is None:
        k_pages, v_pages = k_pages[None], v_pages[None]
        k_scale, v_scale = (None if x is None else x[None] for x in (k_scale, v_scale))
    num_layers, num_kv_heads, num_pages, page, head_dim = k_pages.shape
    _check(q, k_pages, v_pages, k_scale, v_scale, (num_layers, num_pages, num_kv_heads, page), chunk_length)
    max_pages = page_tables.shape[1]
    if pages_per_step is None:
        pages_per_step = (
            _keys_per_step(num_kv_heads, k_pages, min(max_pages, PAGES_PER_STEP) * page, chunk_length, page) // page
        )
    block = pages_per_step * page
    if (chunk_length or 0) % block:
        raise InputError(f"chunk_length is {chunk_length}; it must be a multiple of {pages_per_step} pages of {page}.")

    max_blocks = pl.cdiv(max_pages, pages_per_step)
    lengths = jnp.minimum(lengths, max_pages * page)
    # An entry that no key needs may hold anything, and is read all the same where a step needs its neighbours.
    needed = jnp.arange(max_pages)[None] * page < lengths[:, None]
    tables = jnp.where(needed, jnp.clip(page_tables, 0, num_pages - 1), 0)
    tables = jnp.pad(tables, [(0, 0), (0, max_blocks * pages_per_step - max_pages)]).reshape(-1)

    def page_of(i: int, *at: Any) -> Any:
        row, index = _place(*at)
        return at[-1][(row * max_blocks + index) * pages_per_step + i]

    def keys(i: int, *at: Any) -> tuple[Any, ...]:
        return at[2][LAYER], 0, page_of(i, *at), 0, 0

    def scales(i: int, *at: Any) -> tuple[Any, ...]:
        return at[2][LAYER], page_of(i, *at), 0, 0

    each = range(pages_per_step)
    return _attend(
        q,
        (k_pages, v_pages, k_scale, v_scale),
        [((None, num_kv_heads, None, page, head_dim), functools.partial(keys, i)) for i in each],
        [((None, None, num_kv_heads, page), functools.partial(scales, i)) for i in each],
        lengths,
        (tables,),
        num_kv_heads=num_kv_heads,
        block=block,
        max_blocks=max_blocks,
        layer=layer,
        window=window,
        chunk_length=chunk_length,
        splits=splits,
        interpret=interpret,
    )


def decode_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    window: jax.Array | int | None = None,
    chunk_length: int | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """What `decode_attention` computes, without blocks, from one layer's k and v [B, K, S, h]."""
    batch, num_kv_heads, capacity, head_dim = k.shape
    q = q if chunk_length else q[None]
    queries = q.reshape(q.shape[0], batch, num_kv_heads, -1, head_dim).astype(jnp.float32)
    positions, ends = jnp.arange(capacity)[None], lengths[:, None]
    seen = (positions < ends) & (positions >= ends - (capacity if window is None else window))  # [B, S]
    k, v = (
        jnp.where(seen[:, None, :, None], x.astype(jnp.float32) * (1 if scale is None else scale[..., None]), 0)
        for x, scale in ((k, k_scale), (v, v_scale))
    )
    scores = jnp.einsum("nbkgh,bksh->nbkgs", queries, k, precision="highest") * head_dim**-0.5
    if chunk_length:
        variant = jnp.clip((ends - 1) // chunk_length - positions // chunk_length, 0, 2)[None, :, None, None, :]
        scores = jnp.take_along_axis(scores, variant, axis=0)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores[0], UNSEEN), axis=-1)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, v, precision="highest")
    return out.reshape(q.shape[1:]).astype(q.dtype)


def pages_of(pages: jax.Array, page_tables: jax.Array) -> jax.Array:
    """The contiguous cache [B, K, max_pages * P, h] held by pages [K, N, P, h] and tables [B, max_pages]."""
    gathered = jnp.moveaxis(pages[:, page_tables], 1, 0)  # [B, K, max_pages, P, h]
    return gathered.reshape(*gathered.shape[:2], -1, gathered.shape[-1])


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    scale_shape: tuple[int, ...],
    chunk_length: int | None,
) -> None:
    if q.ndim != (4 if chunk_length else 3) or (chunk_length and q.shape[0] != 3):
        wanted = "[3, B, H, h] with chunk_length" if chunk_length else "[B, H, h] without chunk_length"
        raise InputError(f"q has the shape {q.shape}; it must be {wanted}.")
    if k.ndim != 5 or k.shape != v.shape or k.dtype != v.dtype or k.shape[-1] != q.shape[-1]:
        raise InputError(f"k {k.dtype}{k.shape} and v {v.dtype}{v.shape} must be alike, and as wide as q {q.shape}.")
    num_kv_heads = scale_shape[-2]
    if q.shape[-2] % num_kv_heads:
        raise InputError(f"q has {q.shape[-2]} heads, k and v {num_kv_heads}; q's must be a multiple of theirs.")
    if (k.dtype == jnp.int8) != (k_scale is not None and v_scale is not None):
        raise InputError(f"k and v are {k.dtype}; int8 needs k_scale and v_scale, and only int8 takes them.")
    for scale in (k_scale, v_scale):
        if scale is not None and scale.shape != scale_shape:
            raise InputError(f"A scale has the shape {scale.shape}; expected {scale_shape}, one for each key and head.")


def _keys_per_step(num_kv_heads: int, k: jax.Array, capacity: int, chunk_length: int | None, unit: int) -> int:
    """A power of two times `unit` that divides `chunk_length` and keeps a block of all heads within BLOCK_BYTES."""
    key_bytes = num_kv_heads * pl.cdiv(k.shape[-1], LANES) * LANES * k.dtype.itemsize
    block = unit
    while 2 * block <= min(LONGEST_BLOCK, BLOCK_BYTES // key_bytes) and block < capacity:
        if (chunk_length or 0) % (2 * block):
            break
        block *= 2
    return block


# The scalars that the grid's steps share, in the order in which they lie in scalar memory.
LAYER, WINDOW, STEPS, STEPS_PER_SPLIT = range(4)


def _place(split: Any, i: Any, scalars: Any, rows: Any, offsets: Any, *_: Any) -> tuple[Any, Any]:
    """The sequence, and the block of it, that step i of a part of the list is about."""
    step = _clip(split * scalars[STEPS_PER_SPLIT] + i, scalars)
    row = rows[step]
    return row, step - offsets[row]


def _clip(step: Any, scalars: Any) -> Any:
    return jnp.maximum(jnp.minimum(step, scalars[STEPS] - 1), 0)


def _attend(
    q: jax.Array,
    cache: tuple[jax.Array | None, ...],
    blocks: list[Block],
    scale_blocks: list[Block],
    lengths: jax.Array,
    tables: tuple[jax.Array, ...],
    *,
    num_kv_heads: int,
    block: int,
    max_blocks: int,
    layer: jax.Array | int | None,
    window: jax.Array | int | None,
    chunk_length: int | None,
    splits: int,
    interpret: Any,
) -> jax.Array:
    dtype, head_dim = q.dtype, q.shape[-1]
    q = q if chunk_length else q[None]
    batch = q.shape[1]
    q = q.reshape(q.shape[0], batch, num_kv_heads, -1, head_dim)
    groups = q.shape[3]
    rows_of_q = pl.cdiv(groups, SUBLANES) * SUBLANES
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, rows_of_q - groups), (0, 0)])

    # The list of blocks: sequence b's are the steps [starts[b], ends[b]), from the first that its window reaches.
    window = jnp.asarray(jnp.iinfo(jnp.int32).max if window is None else window, jnp.int32)
    first = jnp.maximum(lengths - window, 0) // block
    ends = jnp.cumsum(pl.cdiv(lengths, block) - first)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    steps = jnp.arange(batch * max_blocks)
    rows = jnp.minimum(jnp.sum(steps[:, None] >= ends[None], axis=1, dtype=jnp.int32), batch - 1)
    steps_per_split = jnp.maximum(pl.cdiv(ends[-1], splits), 1)
    chunk_starts = (lengths - 1) // (chunk_length or 1) * (chunk_length or 1)  # of the queries' own chunks
    scalars = jnp.stack([jnp.asarray(0 if layer is None else layer, jnp.int32), window, ends[-1], steps_per_split])
    prefetched = (scalars, rows, starts - first, lengths, chunk_starts, *tables)

    # Heads narrower than the lanes: XLA holds such arrays with the tokens in the lanes, and so they are read.
    tokens_in_lanes = head_dim < LANES and blocks[0][0][-2] % LANES == 0
    operands, in_specs = [], []
    for array, of in zip(cache, (blocks, blocks, scale_blocks, scale_blocks), strict=True):
        if array is None:
            continue
        if tokens_in_lanes and of is blocks:
            array = array.swapaxes(3, 4)
            of = [(_swap(shape), functools.partial(_swapped, index)) for shape, index in blocks]
        operands += [array] * len(of)
        in_specs += [pl.BlockSpec(shape, index) for shape, index in of]

    def of_row(*at: Any) -> tuple[Any, ...]:
        return 0, _place(*at)[0], 0, 0, 0

    def result(*at: Any) -> tuple[Any, ...]:
        return at[0], *of_row(*at)[1:]

    out_shape = (splits, batch, num_kv_heads, rows_of_q)
    partial, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            num_prefetched=len(prefetched),
            parts=len(blocks),
            block=block,
            chunk_length=chunk_length,
            token_axis=1 if tokens_in_lanes else 0,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(splits, steps_per_split),
            in_specs=[pl.BlockSpec((q.shape[0], None, *q.shape[2:]), of_row), *in_specs],
            out_specs=[pl.BlockSpec((None, None, *out_shape[2:], width), result) for width in (head_dim, LANES)],
            scratch_shapes=[pltpu.VMEM((*out_shape[2:], width), jnp.float32) for width in (LANES, LANES, head_dim)],
        ),
        out_shape=[jax.ShapeDtypeStruct((*out_shape, width), jnp.float32) for width in (head_dim, LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(*prefetched, q, *operands)

    # A part of the list that holds no block of a sequence has written nothing for it.
    split_starts = jnp.arange(splits)[:, None] * steps_per_split
    overlap = jnp.minimum(split_starts + steps_per_split, ends[None]) - jnp.maximum(split_starts, starts[None])
    written = (overlap > 0)[:, :, None, None, None]
    lse = jnp.where(written, lse[..., :1], UNSEEN)
    weights = jnp.where(written, jnp.exp(lse - jnp.max(lse, axis=0, keepdims=True)), 0)
    partial = jnp.where(written, partial, 0)
    out = jnp.sum(partial * weights, axis=0) / jnp.maximum(jnp.sum(weights, axis=0), 1)
    return out[:, :, :groups].reshape(batch, num_kv_heads * groups, head_dim).astype(dtype)


def _swap(index: tuple[Any, ...]) -> tuple[Any, ...]:
    return *index[:-2], index[-1], index[-2]


def _swapped(index_map: Callable[..., tuple[Any, ...]], *at: Any) -> tuple[Any, ...]:
    return _swap(index_map(*at))


def _kernel(*refs: Any, num_prefetched: int, parts: int, block: int, chunk_length: int | None, token_axis: int) -> None:
    scalars, rows, offsets, lengths, chunk_starts = refs[:5]
    q_ref, *operands, out_ref, lse_ref, max_ref, sum_ref, acc_ref = refs[num_prefetched:]
    k_refs, v_refs, *scale_refs = (operands[i : i + parts] for i in range(0, len(operands), parts))
    split, i = pl.program_id(0), pl.program_id(1)
    step = split * scalars[STEPS_PER_SPLIT] + i
    row, index = _place(split, i, scalars, rows, offsets)
    start, length = index * block, lengths[row]
    window_start = length - scalars[WINDOW]
    variant = 0
    if chunk_length:
        own = chunk_starts[row]
        variant = (start < own).astype(jnp.int32) + (start < own - chunk_length).astype(jnp.int32)

    @pl.when((i == 0) | (rows[_clip(step - 1, scalars)] != row))
    def _() -> None:
        max_ref[...] = jnp.full_like(max_ref, UNSEEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend(head: int, masked: bool) -> None:
        def whole(refs: list[Any]) -> jax.Array:
            return refs[0][head] if parts == 1 else jnp.concatenate([ref[head] for ref in refs], axis=token_axis)

        def scale(refs: list[Any]) -> jax.Array:
            return jnp.concatenate([ref[head : head + 1] for ref in refs], axis=1)  # [1, block]

        def seen(shape: tuple[int, ...], axis: int) -> jax.Array:
            positions = start + lax.broadcasted_iota(jnp.int32, shape, axis)
            return (positions < length) & (positions >= window_start)

        k, v = whole(k_refs), whole(v_refs)
        if masked:  # no weight of 0 may meet what lies beyond the end, which may be anything, NaN too
            v = jnp.where(seen(v.shape, token_axis), v.astype(jnp.float32), 0)
        compute = q_ref.dtype if k.dtype == jnp.int8 else k.dtype
        q, k, v = q_ref[variant, head].astype(compute), k.astype(compute), v.astype(compute)
        scores = _dot(q, k, 1 - token_axis) * q.shape[-1] ** -0.5  # [G, block]
        if scale_refs:
            scores *= scale(scale_refs[0])
        if masked:
            visible = seen(scores.shape, 1)
            scores = jnp.where(visible, scores, UNSEEN)
        before = max_ref[head]  # [G, 128], every lane the same
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - now[:, :1])
        kept = jnp.exp(before - now)
        max_ref[head] = now
        sum_ref[head] = sum_ref[head] * kept + jnp.sum(weights, axis=1, keepdims=True)
        if scale_refs:
            weights *= scale(scale_refs[1])
            if masked:
                weights = jnp.where(visible, weights, 0)
        acc_ref[head] = acc_ref[head] * kept[:, :1] + _dot(weights.astype(compute), v, token_axis)

    edge = (start + block > length) | (start < window_start)
    for masked in (False, True):

        @pl.when((step < scalars[STEPS]) & (edge == masked))
        def _(masked: bool = masked) -> None:
            for head in range(q_ref.shape[1]):
                attend(head, masked)

    @pl.when((i == scalars[STEPS_PER_SPLIT] - 1) | (rows[_clip(step + 1, scalars)] != row))
    def _() -> None:
        total = sum_ref[...]
        out_ref[...] = acc_ref[...] / total[:, :, :1]
        lse_ref[...] = max_ref[...] + jnp.log(total)


def _dot(a: jax.Array, b: jax.Array, contracted: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
