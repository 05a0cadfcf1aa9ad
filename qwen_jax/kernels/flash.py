"""Flash attention for TPUs, forward and backward: causal, grouped heads, windows, segments, Dual Chunk Attention.

Scores are held transposed, [keys, queries]: a query is a lane, so its running maximum and sum are rows, reductions run
over sublanes, and nothing is broadcast along lanes. One grid step is one tile of queries and keys for all the query
heads of a key/value head; the tiles come from `flash_tiles`. The backward pass is one kernel of five matrix products:
the gradients of a whole span of keys stay in VMEM while the queries pass by.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels import flash_tiles
from qwen_jax.kernels.flash_tiles import FIRST, KEY, LAST, LIVE, MASKED, QUERY, VARIANT, VARIANTS, Extent

LANES = 128
# A row that sees no key keeps this maximum; a score that is masked lies so far below that exp2 of it is 0 even then.
NOTHING, HIDDEN = -1e30, -1e38
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a tile, the keys of it that one matrix product takes, and those of a masked tile."""

    query: int
    key: int
    step: int
    masked_step: int

    def fit(self, num_queries: int, num_keys: int) -> "Blocks":
        """Blocks of whole lanes that divide short lengths evenly."""
        query, key = _fit(num_queries, self.query), _fit(num_keys, self.key)
        return Blocks(query, key, math.gcd(self.step, key), math.gcd(self.masked_step, key))


@dataclass(frozen=True)
class Chip:
    """Blocks by head width, and the VMEM that the kernels of this file may use."""

    forward: dict[int, Blocks]
    backward: dict[int, Blocks]
    span_bytes: int  # of the gradients of keys and values that stay in VMEM
    vmem_limit_bytes: int


V5E = Chip(
    forward={64: Blocks(512, 1024, 128, 256), 128: Blocks(512, 1024, 128, 256)},
    backward={64: Blocks(512, 1024, 512, 512), 128: Blocks(512, 1024, 512, 512)},
    span_bytes=32 << 20,
    vmem_limit_bytes=100 << 20,
)
CHIPS = {
    "v5e": V5E,
    "v5p": replace(V5E, span_bytes=16 << 20, vmem_limit_bytes=56 << 20),
    "v6e": replace(V5E, forward={64: Blocks(512, 1024, 512, 256), 128: Blocks(512, 1024, 512, 256)}),
}
OTHER_CHIP = replace(V5E, span_bytes=4 << 20, vmem_limit_bytes=16 << 20)


def chip() -> Chip:
    """The row of `CHIPS` for the TPU that is being traced for."""
    try:
        version = str(pltpu.get_tpu_info().chip_version)
    except ValueError:  # not a TPU: interpreted
        return OTHER_CHIP
    return CHIPS.get(version, OTHER_CHIP)


@dataclass(frozen=True)
class _Static:
    """What a kernel is specialised on."""

    scale: float  # of the scores
    window: int | None
    chunk_length: int | None
    offset: int | None  # None: traced
    forward: Blocks
    backward: Blocks
    span: int
    vmem_limit_bytes: int
    interpret: Any

    @property
    def variants(self) -> int:
        return 1 if self.chunk_length is None else VARIANTS


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    query_offset: int | jax.Array = 0,
    window: int | None = None,
    chunk_length: int | None = None,
    forward_blocks: Blocks | None = None,
    backward_blocks: Blocks | None = None,
    span: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The first result of `flash_attention_lse`, with the same arguments: out [B, T, H, h] in q's dtype."""
    out, _ = flash_attention_lse(
        q,
        k,
        v,
        query_segments=query_segments,
        key_segments=key_segments,
        query_offset=query_offset,
        window=window,
        chunk_length=chunk_length,
        forward_blocks=forward_blocks,
        backward_blocks=backward_blocks,
        span=span,
        interpret=interpret,
    )
    return out


def flash_attention_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    query_offset: int | jax.Array = 0,
    window: int | None = None,
    chunk_length: int | None = None,
    forward_blocks: Blocks | None = None,
    backward_blocks: Blocks | None = None,
    span: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(h)) v over the keys each query sees, and the log of that softmax's denominator.

    q [B, T, H, h], k and v [B, K, S, h] -> (out [B, T, H, h] in q's dtype, float32 [B, H, T], natural logarithm).
    Query i stands at key `query_offset` + i (int, or traced int32 scalar or [B]) and sees the keys up to its own,
    the last `window` of them if given, and those of its own segment: `query_segments` int [B, T] and `key_segments`
    int [B, S], where 0 is padding, whatever it holds. A query that sees nothing has output 0 and a log of about -7e29.
    With `chunk_length` C (Dual Chunk Attention, arXiv:2402.17463), q [3, B, T, H, h] is rotated for keys of the same
    chunk, of the one before and of earlier ones, and k by position modulo C. Blocks default to those of the chip;
    `span` is the number of keys whose gradients the backward kernel holds at a time. Both results have gradients.
    Raises InputError for shapes and arguments that do not fit each other.
    """
    _check(q, k, v, query_segments, key_segments, query_offset, window, chunk_length)
    if chunk_length is None:
        q = q[None]
    num_variants, batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    out_dtype = q.dtype
    q = q.astype(k.dtype).reshape(num_variants, batch, num_queries, num_kv_heads, -1, head_dim)
    q = jnp.transpose(q, (0, 1, 3, 4, 5, 2))  # [N, B, K, G, h, T]
    real = None
    if query_segments is not None and key_segments is not None:
        # whatever padding holds, NaN included, reaches neither a result nor a gradient
        real, real_keys = query_segments != 0, (key_segments != 0)[:, None, :, None]
        q = jnp.where(real[None, :, None, None, None], q, 0)
        k, v = jnp.where(real_keys, k, 0), jnp.where(real_keys, v, 0)
    on = chip()
    width = -(-head_dim // LANES) * LANES
    static = _Static(
        scale=head_dim**-0.5,
        window=window,
        chunk_length=chunk_length,
        offset=int(query_offset) if isinstance(query_offset, (int, np.integer)) else None,
        forward=(forward_blocks or on.forward[64 if head_dim <= 64 else 128]).fit(num_queries, num_keys),
        backward=(backward_blocks or on.backward[64 if head_dim <= 64 else 128]).fit(num_queries, num_keys),
        span=span or on.span_bytes // (2 * 4 * width),
        vmem_limit_bytes=on.vmem_limit_bytes,
        interpret=interpret,
    )
    offset = jnp.atleast_1d(jnp.asarray(query_offset, jnp.int32))
    results: Any = _flash(static, q, k, v, offset, query_segments, key_segments)
    out, lse = results  # [B, K, G, h, T], [B, K, G, 1, T]
    if real is not None:
        out = jnp.where(real[:, None, None, None], out, 0)
    out = jnp.transpose(out, (0, 4, 1, 2, 3)).reshape(batch, num_queries, num_heads, head_dim)
    return out.astype(out_dtype), lse.reshape(batch, num_heads, num_queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    static: _Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    out, log2_sum = _forward(static, q, k, v, offset, query_segments, key_segments)
    return out, log2_sum / LOG2_E


def _flash_forward(static: _Static, *args: Any) -> tuple[Any, Any]:
    out, log2_sum = _forward(static, *args)
    return (out, log2_sum / LOG2_E), (*args, out, log2_sum)


def _flash_backward(static: _Static, residuals: Any, cotangents: Any) -> Any:
    return *_backward(static, *residuals, *cotangents), None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _forward(
    static: _Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """q [N, B, K, G, h, T], k and v [B, K, S, h] -> (out [B, K, G, h, T], float32 [B, K, G, 1, T]).

    The second is the logarithm to base 2 of the denominators.
    """
    blocks, num_queries = static.forward, q.shape[-1]
    _, batch, num_kv_heads, groups, head_dim, _ = q.shape
    extent = Extent(blocks.query, blocks.key, num_queries, k.shape[2], static.window, static.chunk_length)
    q, query_segments = _pad(q, blocks.query), _pad(query_segments, blocks.query)
    k, v = _pad(k, blocks.key, axis=2), _pad(jnp.swapaxes(v, 2, 3), blocks.key)
    key_segments = _pad(key_segments, blocks.key)
    where = offset if static.offset is None else static.offset
    table, length = flash_tiles.tiles(extent, where, query_segments, key_segments, per_variant=False)

    heads = (1, 1, groups, head_dim, blocks.query)
    in_specs = [
        _spec((1, *heads), table, lambda b, kv, i, v, j: (v, b, kv, 0, 0, i)),
        _spec((1, 1, blocks.key, head_dim), table, lambda b, kv, i, v, j: (b, kv, j, 0)),
        _spec((1, 1, head_dim, blocks.key), table, lambda b, kv, i, v, j: (b, kv, 0, j)),
        *_segment_specs(blocks, table, query_segments),
    ]
    out_specs = [
        _spec(heads, table, lambda b, kv, i, v, j: (b, kv, 0, 0, i)),
        _spec((1, 1, groups, 1, blocks.query), table, lambda b, kv, i, v, j: (b, kv, 0, 0, i)),
    ]
    row = pltpu.VMEM((groups, 1, blocks.query), jnp.float32)
    out, log2_sum = pl.pallas_call(
        functools.partial(_forward_kernel, static, extent, table.shape, query_segments is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_kv_heads, length),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                row,
                row,
                pltpu.VMEM((groups, head_dim, blocks.query), jnp.float32),
                pltpu.VMEM((blocks.masked_step, blocks.query), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape[1:], q.dtype),
            jax.ShapeDtypeStruct((batch, num_kv_heads, groups, 1, q.shape[-1]), jnp.float32),
        ],
        compiler_params=_params(static),
        interpret=static.interpret,
        name="flash_forward",
    )(table.reshape(-1), offset, q, k, v, *_segment_inputs(query_segments, key_segments))
    return out[..., :num_queries], log2_sum[..., :num_queries]


def _forward_kernel(
    static: _Static,
    extent: Extent,
    table_shape: tuple[int, ...],
    segmented: bool,
    table_ref: Any,
    offset_ref: Any,
    *refs: Any,
) -> None:
    q_ref, k_ref, v_ref, *segment_refs = refs[: 5 if segmented else 3]
    out_ref, log2_sum_ref, max_ref, sum_ref, acc_ref, bias_ref = refs[-6:]
    blocks, groups = static.forward, q_ref.shape[3]
    tile = _tile(blocks, extent, table_shape, table_ref, offset_ref)
    precision = _precision(q_ref.dtype)

    @pl.when(tile.has(FIRST))
    def _() -> None:
        max_ref[...] = jnp.full_like(max_ref, NOTHING)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def products(g: Any, start: Any, size: int) -> jax.Array:
        """Scores [size, queries] of keys `start` onwards, in units of which 2 to the power is taken."""
        scores = _dot(k_ref[0, 0, pl.ds(start, size)], q_ref[0, 0, 0, g], 1, 0, precision)
        return scores * (static.scale * LOG2_E)

    def accumulate(g: Any, scores: jax.Array, start: Any, size: int) -> None:
        highest = jnp.maximum(max_ref[g], jnp.max(scores, axis=0, keepdims=True))
        shrink = jnp.exp2(max_ref[g] - highest)
        weights = jnp.exp2(scores - highest)
        max_ref[g] = highest
        sum_ref[g] = sum_ref[g] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        values = v_ref[0, 0, :, pl.ds(start, size)]
        acc_ref[g] = acc_ref[g] * shrink + _dot(values, weights.astype(values.dtype), 1, 0, precision)

    @pl.when(tile.word & (LIVE | MASKED) == LIVE)
    def _() -> None:
        @pl.loop(0, groups)
        def _(g: Any) -> None:
            scores = products(g, 0, blocks.step)
            for start in range(0, blocks.key, blocks.step):
                following = start + blocks.step
                # asked for before it is needed: the matrix unit works on it during this step's softmax
                ahead = products(g, following, blocks.step) if following < blocks.key else scores
                accumulate(g, scores, start, blocks.step)
                scores = ahead

    @pl.when(tile.has(MASKED))
    def _() -> None:
        @tile.masked_steps
        def _(start: Any) -> None:
            bias_ref[...] = tile.bias(start, segment_refs)

            @pl.loop(0, groups)
            def _(g: Any) -> None:
                accumulate(g, products(g, start, blocks.masked_step) + bias_ref[...], start, blocks.masked_step)

    @pl.when(tile.has(LAST))
    def _() -> None:
        @pl.loop(0, groups)
        def _(g: Any) -> None:
            total = jnp.where(sum_ref[g] == 0, 1.0, sum_ref[g])
            out_ref[0, 0, g] = (acc_ref[g] * (1 / total)).astype(out_ref.dtype)
            log2_sum_ref[0, 0, g] = max_ref[g] + jnp.log2(total)


def _backward(
    static: _Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    out: jax.Array,
    log2_sum: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q [N, B, K, G, h, T], k and v [B, K, S, h]."""
    num_keys = k.shape[2]
    # the gradient of a score is its weight times (d_out . v - delta)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-2, keepdims=True) - d_lse
    span = min(num_keys, -(-static.span // static.backward.key) * static.backward.key)
    starts = range(0, num_keys, span)
    dq = jnp.zeros(q.shape, jnp.float32) if len(starts) > 1 else None
    dk, dv = [], []
    for start in starts:
        keys = slice(start, start + span)
        segments = None if key_segments is None else key_segments[:, keys]
        dq, dk_span, dv_span = _backward_span(
            static, q, k[:, :, keys], v[:, :, keys], offset, query_segments, segments, log2_sum, delta, d_out, start, dq
        )
        dk.append(dk_span)
        dv.append(dv_span)
    assert dq is not None
    return dq.astype(q.dtype), jnp.concatenate(dk, axis=2), jnp.concatenate(dv, axis=2)


def _backward_span(
    static: _Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    log2_sum: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    key_start: int,
    dq: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients from keys `key_start` onwards, all held in VMEM; float32 `dq`, if given, is added to."""
    blocks, num_queries, num_keys = static.backward, q.shape[-1], k.shape[2]
    num_variants, batch, num_kv_heads, groups, head_dim, _ = q.shape
    extent = Extent(blocks.query, blocks.key, num_queries, num_keys, static.window, static.chunk_length, key_start)
    q, d_out, delta = (_pad(x, blocks.query) for x in (q, d_out, delta))
    log2_sum = _pad(log2_sum, blocks.query, value=-NOTHING)  # so that queries which are not there weigh nothing
    k, v = (_pad(x, blocks.key, axis=2) for x in (k, v))
    query_segments, key_segments = _pad(query_segments, blocks.query), _pad(key_segments, blocks.key)
    offset = offset - key_start
    where = None if static.offset is None else static.offset - key_start
    table, length = flash_tiles.tiles(
        extent, offset if where is None else where, query_segments, key_segments, per_variant=True
    )

    query_spec = _spec((1, 1, 1, groups, head_dim, blocks.query), table, lambda b, kv, i, v, j: (v, b, kv, 0, 0, i))
    heads_spec = _spec((1, 1, groups, head_dim, blocks.query), table, lambda b, kv, i, v, j: (b, kv, 0, 0, i))
    row_spec = _spec((1, 1, groups, 1, blocks.query), table, lambda b, kv, i, v, j: (b, kv, 0, 0, i))
    key_spec = _spec((1, 1, blocks.key, head_dim), table, lambda b, kv, i, v, j: (b, kv, j, 0))
    all_keys_spec = _spec((1, 1, k.shape[2], head_dim), table, lambda b, kv, i, v, j: (b, kv, 0, 0))
    accumulated = [] if dq is None else [_pad(dq, blocks.query)]
    inputs = [q, k, v, *_segment_inputs(query_segments, key_segments), d_out, log2_sum, delta, *accumulated]
    scalars = 2
    new_dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, static, extent, table.shape, query_segments is not None, dq is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=(batch, num_kv_heads, length),
            in_specs=[
                query_spec,
                key_spec,
                key_spec,
                *_segment_specs(blocks, table, query_segments),
                heads_spec,
                row_spec,
                row_spec,
                *([] if dq is None else [query_spec]),
            ],
            out_specs=[query_spec, all_keys_spec, all_keys_spec],
            scratch_shapes=[
                pltpu.VMEM((groups, head_dim, blocks.query), jnp.float32),
                pltpu.VMEM(k.shape[2:], jnp.float32),
                pltpu.VMEM(k.shape[2:], jnp.float32),
                pltpu.VMEM((blocks.masked_step, blocks.query), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype if dq is None else jnp.float32),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        input_output_aliases={} if dq is None else {scalars + len(inputs) - 1: 0},
        compiler_params=_params(static),
        interpret=static.interpret,
        name="flash_backward",
    )(table.reshape(-1), offset, *inputs)
    return new_dq[..., :num_queries], dk[:, :, :num_keys], dv[:, :, :num_keys]


def _backward_kernel(
    static: _Static,
    extent: Extent,
    table_shape: tuple[int, ...],
    segmented: bool,
    adds: bool,
    table_ref: Any,
    offset_ref: Any,
    *refs: Any,
) -> None:
    q_ref, k_ref, v_ref, *rest = refs
    segment_refs, rest = (rest[:2], rest[2:]) if segmented else ([], rest)
    d_out_ref, log2_sum_ref, delta_ref, *rest = rest
    dq_in_ref, rest = (rest[0], rest[1:]) if adds else (None, rest)
    dq_ref, dk_ref, dv_ref, dq_acc_ref, dk_acc_ref, dv_acc_ref, bias_ref = rest
    blocks, groups = static.backward, q_ref.shape[3]
    tile = _tile(blocks, extent, table_shape, table_ref, offset_ref)
    precision = _precision(q_ref.dtype)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    @pl.when(tile.has(FIRST))
    def _() -> None:
        dq_acc_ref[...] = jnp.zeros_like(dq_acc_ref)

    def products(g: Any, start: Any, size: int) -> tuple[jax.Array, jax.Array]:
        """Scores and the gradients of the weights, both [size, queries], of keys `start` onwards."""
        keys = pl.ds(start, size)
        scores = _dot(k_ref[0, 0, keys], q_ref[0, 0, 0, g], 1, 0, precision) * (static.scale * LOG2_E)
        return scores, _dot(v_ref[0, 0, keys], d_out_ref[0, 0, g], 1, 0, precision)

    def accumulate(g: Any, scores: jax.Array, d_weights: jax.Array, start: Any, size: int) -> None:
        q, keys, d_out = q_ref[0, 0, 0, g], k_ref[0, 0, pl.ds(start, size)], d_out_ref[0, 0, g]
        weights = jnp.exp2(scores - log2_sum_ref[0, 0, g])
        d_scores = (weights * (d_weights - delta_ref[0, 0, g])).astype(q.dtype)
        rows = pl.ds(pl.multiple_of(tile.key_block * blocks.key + start, size), size)
        dv_acc_ref[rows] += _dot(weights.astype(q.dtype), d_out, 1, 1, precision)
        dk_acc_ref[rows] += _dot(d_scores, q, 1, 1, precision)
        dq_acc_ref[g] += _dot(keys, d_scores, 0, 0, precision)

    @pl.when(tile.word & (LIVE | MASKED) == LIVE)
    def _() -> None:
        @pl.loop(0, groups)
        def _(g: Any) -> None:
            current = products(g, 0, blocks.step)
            for start in range(0, blocks.key, blocks.step):
                following = start + blocks.step
                ahead = products(g, following, blocks.step) if following < blocks.key else current
                accumulate(g, *current, start, blocks.step)
                current = ahead

    @pl.when(tile.has(MASKED))
    def _() -> None:
        @tile.masked_steps
        def _(start: Any) -> None:
            bias_ref[...] = tile.bias(start, segment_refs)

            @pl.loop(0, groups)
            def _(g: Any) -> None:
                scores, d_weights = products(g, start, blocks.masked_step)
                accumulate(g, scores + bias_ref[...], d_weights, start, blocks.masked_step)

    @pl.when(tile.has(LAST))
    def _() -> None:
        @pl.loop(0, groups)
        def _(g: Any) -> None:
            dq = dq_acc_ref[g] * static.scale
            if dq_in_ref is not None:
                dq += dq_in_ref[0, 0, 0, g]
            dq_ref[0, 0, 0, g] = dq.astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        dk_ref[0, 0] = (dk_acc_ref[...] * static.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_acc_ref[...].astype(dv_ref.dtype)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, precision: Any) -> jax.Array:
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _precision(dtype: Any) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


@dataclass(frozen=True)
class _Tile:
    """One grid step's tile, as its word in the table tells it."""

    blocks: Blocks
    extent: Extent
    word: Any
    first_query: Any  # the key that the tile's first query stands at

    @property
    def key_block(self) -> Any:
        return _field(self.word, KEY, QUERY)

    def has(self, flag: int) -> Any:
        return self.word & flag != 0

    def masked_steps(self, body: Any) -> None:
        """Calls body(first key within the tile) for each step of keys that a query of the tile may see."""
        step, extent = self.blocks.masked_step, self.extent
        before = self.first_query - self.key_block * self.blocks.key  # keys of the tile before its first query
        last = jnp.minimum((before + self.blocks.query - 1) // step, self.blocks.key // step - 1)
        first = 0 if extent.window is None else jnp.maximum(before - extent.window + 1, 0) // step

        @pl.loop(first, last + 1)
        def _(i: Any) -> None:
            body(pl.multiple_of(i * step, step))

    def bias(self, start: Any, segment_refs: Any) -> jax.Array:
        """0 where a query may see a key and HIDDEN where not: [masked_step, queries], from key `start` of the tile."""
        blocks, extent = self.blocks, self.extent
        shape = (blocks.masked_step, blocks.query)
        query = self.first_query + lax.broadcasted_iota(jnp.int32, (1, blocks.query), 1)
        key = self.key_block * blocks.key + start + lax.broadcasted_iota(jnp.int32, shape, 0)
        # every query sees one run of keys, [low, high)
        low, high = jnp.zeros_like(query), jnp.minimum(query + 1, extent.num_keys)
        if extent.window is not None:
            low = jnp.maximum(low, query - (extent.window - 1))
        if extent.chunk_length is not None:
            variant, length = _field(self.word, VARIANT, KEY), extent.chunk_length
            first_chunk = lax.div(self.first_query + extent.key_start, length) * length - extent.key_start
            chunk = first_chunk  # where each query's chunk begins
            for i in range(1, (blocks.query - 1) // length + 2):
                chunk = jnp.where(query >= first_chunk + i * length, first_chunk + i * length, chunk)
            low = jnp.maximum(low, jnp.where(variant == 0, chunk, jnp.where(variant == 1, chunk - length, low)))
            high = jnp.minimum(high, jnp.where(variant == 0, high, jnp.where(variant == 1, chunk, chunk - length)))
        seen = (key >= low) & (key < high)
        if segment_refs:
            query_segments, key_segments = segment_refs
            # a row of lanes becomes a column of sublanes
            column = jnp.broadcast_to(key_segments[0, :, pl.ds(start, shape[0])], (LANES, shape[0])).T
            column = jnp.tile(column, (1, blocks.query // LANES))
            seen &= (column == query_segments[0]) & (column != 0)
        return jnp.where(seen, 0.0, HIDDEN)


def _field(word: Any, begin: int, end: int) -> Any:
    return (word >> begin) & ((1 << (end - begin)) - 1)


def _word(table_ref: Any, shape: tuple[int, ...], b: Any, step: Any) -> Any:
    """The tile of a grid step; the rows of a batch share a table of one row."""
    rows, width = shape
    return table_ref[step if rows == 1 else b * width + step]


def _tile(blocks: Blocks, extent: Extent, shape: tuple[int, ...], table_ref: Any, offset_ref: Any) -> _Tile:
    b = pl.program_id(0)
    word = _word(table_ref, shape, b, pl.program_id(2))
    offset = offset_ref[0 if offset_ref.shape[0] == 1 else b]
    return _Tile(blocks, extent, word, offset + (word >> QUERY) * blocks.query)


def _spec(block: tuple[int, ...], table: jax.Array, index: Any) -> pl.BlockSpec:
    """index(batch row, key/value head, query block, variant, key block) -> the block that a grid step works on."""

    def index_map(b: Any, kv: Any, step: Any, table_ref: Any, _: Any) -> Any:
        word = _word(table_ref, table.shape, b, step)
        return index(b, kv, word >> QUERY, _field(word, VARIANT, KEY), _field(word, KEY, QUERY))

    return pl.BlockSpec(block, index_map)


def _segment_specs(blocks: Blocks, table: jax.Array, segments: jax.Array | None) -> list[pl.BlockSpec]:
    if segments is None:
        return []
    return [
        _spec((1, 1, blocks.query), table, lambda b, kv, i, v, j: (b, 0, i)),
        _spec((1, 1, blocks.key), table, lambda b, kv, i, v, j: (b, 0, j)),
    ]


def _segment_inputs(*segments: jax.Array | None) -> list[jax.Array]:
    return [x[:, None] for x in segments if x is not None]


def _pad(x: Any, block: int, axis: int = -1, value: float = 0) -> Any:
    """The array, if any, with `value` up to a whole number of blocks."""
    if x is None:
        return None
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, width, constant_values=value)


def _fit(length: int, largest: int) -> int:
    """The smallest block of whole lanes that needs no more blocks than the largest does."""
    return -(-length // (-(-length // largest) * LANES)) * LANES


def _params(static: _Static) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=static.vmem_limit_bytes
    )


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    query_offset: int | jax.Array,
    window: int | None,
    chunk_length: int | None,
) -> None:
    dims = "[B, T, H, h]" if chunk_length is None else f"[{VARIANTS}, B, T, H, h]"
    if q.ndim != (4 if chunk_length is None else 5) or (chunk_length is not None and q.shape[0] != VARIANTS):
        raise InputError(f"flash attention takes q {dims}, and was given one of shape {list(q.shape)}; reshape it.")
    batch, num_queries, num_heads, head_dim = q.shape[-4:]
    if k.ndim != 4 or k.shape != v.shape or (k.shape[0], k.shape[3]) != (batch, head_dim) or num_heads % k.shape[1]:
        raise InputError(
            f"flash attention takes k and v [B, K, S, h] of q's B and h, with K dividing H; q is {list(q.shape)}, "
            f"k {list(k.shape)} and v {list(v.shape)}."
        )
    if k.dtype != v.dtype:
        raise InputError(f"flash attention takes k and v of one dtype, not {k.dtype} and {v.dtype}; cast one of them.")
    if (query_segments is None) != (key_segments is None):
        raise InputError("flash attention takes query_segments and key_segments together; give both or neither.")
    if query_segments is not None and key_segments is not None:
        wanted = (batch, num_queries), (batch, k.shape[2])
        if (query_segments.shape, key_segments.shape) != wanted:
            raise InputError(
                f"flash attention takes query_segments {list(wanted[0])} and key_segments {list(wanted[1])}, "
                f"not {list(query_segments.shape)} and {list(key_segments.shape)}."
            )
    if jnp.shape(query_offset) not in ((), (batch,)):
        raise InputError(
            f"flash attention takes one query_offset, or one for each of the {batch} rows, "
            f"not an array of shape {list(jnp.shape(query_offset))}."
        )
    for name, value in (("window", window), ("chunk_length", chunk_length)):
        if value is not None and value < 1:
            raise InputError(f"flash attention takes a {name} of at least 1, not {value}; leave it out for none.")
