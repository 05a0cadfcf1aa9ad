"""Flash attention for TPUs, forward and backward: causal, grouped heads, windows, segments, Dual Chunk Attention.

`flash_kernels` holds the two kernels, `flash_tiles` the order in which they walk the tiles of an attention.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.flash_kernels import LANES, LOG2_E, Blocks, Static, backward, forward
from qwen_jax.kernels.flash_tiles import VARIANTS


class Chip:
    """Blocks by head width, the VMEM, in bytes, of a core, and the cores that share a kernel's grid."""

    def __init__(
        self, forward: dict[int, Blocks], backward: dict[int, Blocks], spans: int, limit: int, cores: int = 1
    ) -> None:
        self.forward, self.backward, self.cores = forward, backward, cores
        self.spans = spans  # for the gradients of keys and values, which stay in VMEM while the queries pass by
        self.limit = limit  # of what a kernel may use in all


MIB = 1 << 20
BACKWARD = {64: Blocks(512, 1024, 512, 512), 128: Blocks(512, 1024, 512, 512)}
# fewer keys to a product mean fewer spills but more loading of the matrix unit, of which v6e's is wider
NARROW = {64: Blocks(512, 2048, 128, 512), 128: Blocks(512, 2048, 128, 512)}
WIDE = {64: Blocks(512, 2048, 256, 512), 128: Blocks(512, 2048, 256, 512)}
CHIPS = {
    "v5e": Chip(NARROW, BACKWARD, 64 * MIB, 110 * MIB),
    "v5p": Chip(NARROW, BACKWARD, 32 * MIB, 60 * MIB, cores=2),
    "v6e": Chip(WIDE, BACKWARD, 64 * MIB, 110 * MIB),
}
SMALL = {64: Blocks(256, 512, 128, 256), 128: Blocks(256, 512, 128, 256)}
OTHER_CHIP = Chip(SMALL, SMALL, 2 * MIB, 16 * MIB)


def chip() -> Chip:
    """The row of `CHIPS` for the TPU that is being traced for."""
    try:
        return CHIPS.get(str(pltpu.get_tpu_info().chip_version), OTHER_CHIP)
    except ValueError:  # not a TPU: interpreted
        return OTHER_CHIP


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    """The output [B, T, H, h] alone of `flash_attention_lse`, which says what the arguments are."""
    return flash_attention_lse(q, k, v, **options)[0]


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
    Query i stands at key `query_offset` + i (an int, or traced int32, one or [B]) and sees the keys up to its own,
    the last `window` of them if given, and those of its own segment: `query_segments` int [B, T] and `key_segments`
    int [B, S], where 0 is padding, whatever it holds. A query that sees nothing has output 0 and a log of about -7e29.
    With `chunk_length` C (Dual Chunk Attention, arXiv:2402.17463), q [3, B, T, H, h] is rotated for keys of the same
    chunk, of the one before and of earlier ones, and k by position modulo C. Blocks default to those of the chip;
    `span` is the number of keys whose gradients the backward kernel holds at a time. Both results have gradients.
    `interpret` runs the kernels on a CPU: True, or `pltpu.InterpretParams` with its options.
    Raises InputError for shapes and arguments that do not fit each other.
    """
    _check(q, k, v, query_segments, key_segments, query_offset, window, chunk_length)
    if chunk_length is None:
        q = q[None]
    num_variants, batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    out_dtype, real = q.dtype, None
    if query_segments is not None and key_segments is not None:
        # whatever padding holds, NaN included, reaches neither a result nor a gradient
        real, real_keys = (query_segments != 0)[:, :, None, None], (key_segments != 0)[:, None, :, None]
        q, k, v = jnp.where(real[None], q, 0), jnp.where(real_keys, k, 0), jnp.where(real_keys, v, 0)
    on, width = chip(), 64 if head_dim <= 64 else 128
    static = Static(
        scale=head_dim**-0.5,
        # heads that do not fill the lanes lie [h, T], and so does XLA keep them; others [T, h]
        width_axis=1 if head_dim % LANES == 0 else 0,
        window=window,
        chunk_length=chunk_length,
        offset=int(query_offset) if isinstance(query_offset, (int, np.integer)) else None,
        forward=(forward_blocks or on.forward[width]).fit(num_queries, num_keys, num_heads // num_kv_heads),
        backward=(backward_blocks or on.backward[width]).fit(num_queries, num_keys, num_heads // num_kv_heads),
        span=span or on.spans // (2 * 4 * -(-head_dim // LANES) * LANES),
        parts=on.cores if batch * num_kv_heads % on.cores else 1,
        vmem_limit_bytes=on.limit,
        interpret=interpret,
    )
    q = q.astype(k.dtype).reshape(num_variants, batch, num_queries, num_kv_heads, -1, head_dim)
    q = jnp.moveaxis(q, 2, 4 if static.width_axis else 5)  # [N, B, K, G, T, h] or [N, B, K, G, h, T]
    offset = jnp.atleast_1d(jnp.asarray(query_offset, jnp.int32))
    results: Any = _flash(static, q, k, v, offset, query_segments, key_segments)
    out = jnp.moveaxis(results[0], 3 if static.width_axis else 4, 1).reshape(batch, num_queries, num_heads, head_dim)
    if real is not None:
        out = jnp.where(real, out, 0)
    return out.astype(out_dtype), results[1].reshape(batch, num_heads, num_queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: Static, *args: Any) -> tuple[jax.Array, jax.Array]:
    out, log2_sum = forward(static, *args)
    return out, log2_sum / LOG2_E


def _flash_forward(static: Static, *args: Any) -> Any:
    out, log2_sum = (checkpoint_name(result, "attention") for result in forward(static, *args))
    return (out, log2_sum / LOG2_E), (*args, out, log2_sum)


def _flash_backward(static: Static, residuals: Any, cotangents: Any) -> Any:
    """A span of keys at a time; the parts of dq are summed in float32."""
    q, k, v, offset, query_segments, key_segments, out, log2_sum = residuals
    d_out, d_lse = cotangents
    # the gradient of a score is its weight times (d_out . v - delta)
    product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.sum(product, axis=-1 if static.width_axis else -2).reshape(d_lse.shape) - d_lse
    num_keys = k.shape[2]
    span = min(num_keys, -(-static.span // static.backward.key) * static.backward.key)
    dq = jnp.zeros(q.shape, jnp.float32) if span < num_keys else None
    dk, dv = [], []
    for start in range(0, num_keys, span):
        keys = slice(start, start + span)
        here = replace(static, offset=None if static.offset is None else static.offset - start)
        segments = None if key_segments is None else key_segments[:, keys]
        dq, *new = backward(
            here,
            start,
            dq,
            q,
            k[:, :, keys],
            v[:, :, keys],
            offset - start,
            query_segments,
            segments,
            d_out,
            log2_sum,
            delta,
        )
        dk.append(new[0])
        dv.append(new[1])
    dq, dk, dv = jnp.asarray(dq, q.dtype), jnp.concatenate(dk, axis=2), jnp.concatenate(dv, axis=2)
    return dq, dk, dv, None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


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
