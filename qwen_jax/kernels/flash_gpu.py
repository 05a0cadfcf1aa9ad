"""Flash attention for NVIDIA GPUs through Pallas and Triton, forward and backward, with the interface of `flash`.

One program holds one tile of queries (or, for the gradients of keys and values, of keys) and loops over the tiles of
the other side that it can see: first those that need a mask, then those that need none, then the rest that need one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.errors import InputError
from qwen_jax.kernels.gpu import HIDDEN, LOG2_E, NOTHING, dot

# Padding's segments: never equal, and last, as padding mostly is, so that whole blocks of it are left out.
NO_QUERY, NO_KEY = jnp.iinfo(jnp.int32).max - 1, jnp.iinfo(jnp.int32).max


class Blocks(NamedTuple):
    """Queries and keys of a tile, the warps that share it, and how many tiles are on their way at a time."""

    query: int
    key: int
    warps: int
    stages: int

    @property
    def compiler_params(self) -> triton.CompilerParams:
        return triton.CompilerParams(num_warps=self.warps, num_stages=self.stages)


class Plan(NamedTuple):
    """Blocks of the three kernels."""

    forward: Blocks
    d_query: Blocks
    d_key: Blocks


# The fastest of those that `bench.gpu tiles` measured on an H100, 2026-11-26. float32 products run without the matrix
# units, which would round to TF32, and leave room for less.
FLOAT32 = Plan(Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 2))
PLANS = {
    64: Plan(Blocks(128, 128, 4, 2), Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 2)),
    128: Plan(Blocks(128, 64, 4, 2), Blocks(128, 32, 8, 3), Blocks(64, 64, 4, 2)),
}


class _Static(NamedTuple):
    """What the kernels are specialised on."""

    windowed: bool
    chunk_length: int | None
    split_tiles: bool  # whether a tile may lie in two chunks, and so need a mask for that alone
    plan: Plan
    interpret: bool


class _Shape(NamedTuple):
    variants: int
    batch: int
    queries: int
    heads: int
    kv_heads: int
    keys: int
    head_dim: int

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        """Of a product of query and key, into the units of the softmax."""
        return self.head_dim**-0.5 * LOG2_E


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    query_offset: int | jax.Array = 0,
    window: int | jax.Array | None = None,
    chunk_length: int | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The first result of `flash_attention_lse`, with the same arguments: out [B, T, H, h] in q's dtype."""
    return flash_attention_lse(
        q,
        k,
        v,
        query_segments=query_segments,
        key_segments=key_segments,
        query_offset=query_offset,
        window=window,
        chunk_length=chunk_length,
        plan=plan,
        interpret=interpret,
    )[0]


def flash_attention_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    query_offset: int | jax.Array = 0,
    window: int | jax.Array | None = None,
    chunk_length: int | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(h)) v over the keys each query sees, and the log of that softmax's denominator.

    q [B, T, H, h], k and v [B, K, S, h], h a power of two -> (out [B, T, H, h] in q's dtype, float32 [B, H, T], natural
    logarithm). Query i stands at key `query_offset` + i (int, or int32 scalar or [B]) and sees the keys up to its own,
    the last `window` of them if given, and those of its own segment: `query_segments` int [B, T] and `key_segments`
    int [B, S], where 0 is padding, whatever it holds. A query that sees nothing has output 0 and a log of about -7e29.
    With `chunk_length` C (Dual Chunk Attention, arXiv 2402.17463), q [3, B, T, H, h] is rotated for keys of the same
    chunk, of the one before and of earlier ones, and k by position modulo C. Both results have gradients. Raises
    InputError for shapes and arguments that do not fit each other.
    """
    _check(q, k, v, query_segments, key_segments, chunk_length)
    if chunk_length is None:
        q = q[None]
    dtype, batch = q.dtype, k.shape[0]
    q = q.astype(k.dtype)
    segments, real = None, None
    if query_segments is not None and key_segments is not None:
        # whatever padding holds, NaN included, reaches neither a result nor a gradient
        real, real_keys = (query_segments != 0)[:, :, None, None], (key_segments != 0)[:, None, :, None]
        q, k, v = jnp.where(real[None], q, 0), jnp.where(real_keys, k, 0), jnp.where(real_keys, v, 0)
        segments = tuple(
            jnp.where(segment == 0, none, segment).astype(jnp.int32)
            for segment, none in ((query_segments, NO_QUERY), (key_segments, NO_KEY))
        )
    if plan is None:
        plan = FLOAT32 if k.dtype == jnp.float32 else PLANS[128 if k.shape[-1] > 64 else 64]
    offsets = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32).reshape(-1), (batch,))
    windows = jnp.broadcast_to(jnp.minimum(0 if window is None else window, 1 << 30), (batch,)).astype(jnp.int32)
    split_tiles = chunk_length is not None and not (
        isinstance(query_offset, int)
        and query_offset + q.shape[2] <= k.shape[2]
        and all(x % n == 0 for x in (chunk_length, query_offset) for blocks in plan for n in blocks[:2])
    )
    static = _Static(window is not None, chunk_length, split_tiles, plan, interpret)
    results: Any = _flash(static, q, k, v, jnp.stack([offsets, windows], axis=1), segments)
    out, lse = results
    if real is not None:
        out = jnp.where(real, out, 0)
    return out.astype(dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _Static, q: Any, k: Any, v: Any, scalars: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
    return _forward(static, q, k, v, scalars, segments)


def _flash_forward(static: _Static, *args: Any) -> tuple[Any, Any]:
    out, lse = (checkpoint_name(result, "attention") for result in _forward(static, *args))
    return (out, lse), (*args, out, lse)


def _flash_backward(static: _Static, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    q, k, v, scalars, segments, out, lse = residuals
    d_out, d_lse = cotangents
    # d_scores = weights * (d_weights - delta); the logarithm's own gradient is its weights again
    delta = jnp.einsum("bthd,bthd->bht", d_out, out, preferred_element_type=jnp.float32) - d_lse
    args = (static, q, k, v, scalars, segments, d_out.astype(k.dtype), lse, delta)
    return _d_query(*args), *_d_key(*args), None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _forward(static: _Static, q: Any, k: Any, v: Any, scalars: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
    shape, blocks = _shape(q, k), static.plan.forward
    spec = _Specs(shape, blocks)
    segment_args, segment_specs = spec.segments_of_query_tile(segments)
    return pl.pallas_call(
        functools.partial(_forward_kernel, static, shape),
        grid=spec.query_grid,
        in_specs=[spec.scalars, spec.query_tile, spec.keys, spec.keys, *segment_specs],
        out_specs=[spec.out_tile, spec.row_tile],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape[1:], q.dtype),
            jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.queries), jnp.float32),
        ],
        compiler_params=blocks.compiler_params,
        interpret=static.interpret,
        name="flash_forward",
    )(scalars, q, k, v, *segment_args)


def _forward_kernel(static: _Static, shape: _Shape, *refs: Any) -> None:
    scalars, q_ref, k_ref, v_ref, *segment_refs, out_ref, lse_ref = refs
    tile = _QueryTile(static, static.plan.forward, shape, scalars, segment_refs)
    carry = (
        jnp.zeros((tile.blocks.query, shape.head_dim), jnp.float32),
        jnp.full((tile.blocks.query,), NOTHING, jnp.float32),
        jnp.zeros((tile.blocks.query,), jnp.float32),
    )
    for variant in range(shape.variants):
        q = tile.load_rows(q_ref.at[jnp.int32(variant)])

        def step(j: Any, carry: Any, masked: bool, variant: int = variant, q: jax.Array = q) -> Any:
            acc, highest, total = carry
            k, v = tile.load_keys(k_ref, j, masked), tile.load_keys(v_ref, j, masked)
            scores = dot(q, k, 1, 1) * shape.scale
            if masked:
                scores = jnp.where(tile.visible(j, variant), scores, HIDDEN)
            now = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights, kept = jnp.exp2(scores - now[:, None]), jnp.exp2(highest - now)
            acc = acc * kept[:, None] + dot(weights.astype(v.dtype), v, 1, 0)
            return acc, now, total * kept + jnp.sum(weights, axis=1)

        carry = tile.loop(variant, step, carry)
    acc, highest, total = carry
    total = jnp.where(total > 0, total, 1)
    triton.store(lse_ref, (highest + jnp.log2(total)) / LOG2_E, mask=tile.real)
    triton.store(out_ref, (acc / total[:, None]).astype(out_ref.dtype), mask=tile.real[:, None])


def _d_query(
    static: _Static, q: Any, k: Any, v: Any, scalars: Any, segments: Any, d_out: Any, lse: Any, delta: Any
) -> jax.Array:
    shape, blocks = _shape(q, k), static.plan.d_query
    spec = _Specs(shape, blocks)
    segment_args, segment_specs = spec.segments_of_query_tile(segments)
    rows = [spec.out_tile, spec.row_tile, spec.row_tile]
    return pl.pallas_call(
        functools.partial(_d_query_kernel, static, shape),
        grid=spec.query_grid,
        in_specs=[spec.scalars, spec.query_tile, spec.keys, spec.keys, *rows, *segment_specs],
        out_specs=spec.query_tile,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=blocks.compiler_params,
        interpret=static.interpret,
        name="flash_d_query",
    )(scalars, q, k, v, d_out, lse, delta, *segment_args)


def _d_query_kernel(static: _Static, shape: _Shape, *refs: Any) -> None:
    scalars, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *segment_refs, d_q_ref = refs
    tile = _QueryTile(static, static.plan.d_query, shape, scalars, segment_refs)
    d_out = tile.load_rows(d_out_ref)
    lse = triton.load(lse_ref, mask=tile.real, other=0) * LOG2_E
    delta = triton.load(delta_ref, mask=tile.real, other=0)
    for variant in range(shape.variants):
        q = tile.load_rows(q_ref.at[jnp.int32(variant)])

        def step(j: Any, d_q: jax.Array, masked: bool, variant: int = variant, q: jax.Array = q) -> jax.Array:
            k, v = tile.load_keys(k_ref, j, masked), tile.load_keys(v_ref, j, masked)
            scores = dot(q, k, 1, 1) * shape.scale
            if masked:
                scores = jnp.where(tile.visible(j, variant), scores, HIDDEN)
            d_scores = jnp.exp2(scores - lse[:, None]) * (dot(d_out, v, 1, 1) - delta[:, None])
            return d_q + dot(d_scores.astype(k.dtype), k, 1, 0)

        d_q = tile.loop(variant, step, jnp.zeros((tile.blocks.query, shape.head_dim), jnp.float32))
        d_q = (d_q * shape.head_dim**-0.5).astype(d_q_ref.dtype)
        triton.store(d_q_ref.at[jnp.int32(variant)], d_q, mask=tile.real[:, None])


def _d_key(
    static: _Static, q: Any, k: Any, v: Any, scalars: Any, segments: Any, d_out: Any, lse: Any, delta: Any
) -> tuple[jax.Array, jax.Array]:
    shape, blocks = _shape(q, k), static.plan.d_key
    spec = _Specs(shape, blocks)
    segment_args, segment_specs = spec.segments_of_key_tile(segments)
    rows = [spec.outs, spec.rows, spec.rows]
    return pl.pallas_call(
        functools.partial(_d_key_kernel, static, shape),
        grid=spec.key_grid,
        in_specs=[spec.scalars, spec.queries, spec.key_tile, spec.key_tile, *rows, *segment_specs],
        out_specs=[spec.key_tile, spec.key_tile],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        compiler_params=blocks.compiler_params,
        interpret=static.interpret,
        name="flash_d_key",
    )(scalars, q, k, v, d_out, lse, delta, *segment_args)


def _d_key_kernel(static: _Static, shape: _Shape, *refs: Any) -> None:
    """Scores stand transposed here, [keys, queries]."""
    scalars, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *segment_refs, d_k_ref, d_v_ref = refs
    tile = _KeyTile(static, static.plan.d_key, shape, scalars, segment_refs)
    k, v = (triton.load(ref, mask=tile.real[:, None], other=0) for ref in (k_ref, v_ref))

    def head(g: Any, carry: Any) -> Any:
        for variant in range(shape.variants):

            def step(i: Any, carry: Any, masked: bool, variant: int = variant) -> Any:
                d_k, d_v = carry
                at = pl.ds(i * tile.blocks.query, tile.blocks.query)
                q = tile.load_rows(q_ref.at[jnp.int32(variant), at, g, :], i, masked)
                d_out = tile.load_rows(d_out_ref.at[at, g, :], i, masked)
                lse = tile.load_rows(lse_ref.at[g, at], i, masked) * LOG2_E
                delta = tile.load_rows(delta_ref.at[g, at], i, masked)
                scores = dot(k, q, 1, 1) * shape.scale
                if masked:
                    visible = tile.visible(i, variant)
                    scores = jnp.where(visible, scores, HIDDEN)
                weights = jnp.exp2(scores - lse[None])
                d_v += dot(weights.astype(d_out.dtype), d_out, 1, 0)
                d_scores = weights * (dot(v, d_out, 1, 1) - delta[None])
                if masked:  # a value that nothing sees may be NaN
                    d_scores = jnp.where(visible, d_scores, 0)
                return d_k + dot(d_scores.astype(q.dtype), q, 1, 0), d_v

            carry = tile.loop(variant, step, carry)
        return carry

    zeros = jnp.zeros((tile.blocks.key, shape.head_dim), jnp.float32)
    d_k, d_v = lax.fori_loop(0, shape.groups, head, (zeros, zeros))
    d_k = d_k * shape.head_dim**-0.5
    triton.store(d_k_ref, d_k.astype(d_k_ref.dtype), mask=tile.real[:, None])
    triton.store(d_v_ref, d_v.astype(d_v_ref.dtype), mask=tile.real[:, None])


def _div(x: Any, n: int) -> Any:
    """x // n of int32; 0 for negative x."""
    return lax.div(jnp.maximum(x, 0).astype(jnp.int32), jnp.int32(n))


class _QueryTile:
    """A tile of queries and how it meets the keys."""

    def __init__(self, static: _Static, blocks: Blocks, shape: _Shape, scalars: Any, segment_refs: list[Any]) -> None:
        self.static, self.blocks, self.shape = static, blocks, shape
        # the last queries see the most keys: they begin first
        start = (pl.num_programs(1) - 1 - pl.program_id(1)) * blocks.query
        batch = pl.program_id(2)
        self.offset, self.window = scalars[batch, 0], scalars[batch, 1]
        rows = start + jnp.arange(blocks.query)
        self.real, self.positions = rows < shape.queries, self.offset + rows
        self.first = self.offset + start
        self.last = self.offset + jnp.minimum(start + blocks.query, shape.queries) - 1
        self.num_keys = jnp.minimum(self.last + 1, shape.keys)
        self.segments: Any = None
        if segment_refs:
            query_segments_ref, self.key_segments_ref, reach_ref = segment_refs
            self.segments = triton.load(query_segments_ref, mask=self.real, other=NO_QUERY)
            self.reach = reach_ref[0], reach_ref[1]

    def load_rows(self, ref: Any) -> jax.Array:
        return triton.load(ref, mask=self.real[:, None], other=0)

    def keys(self, j: Any) -> jax.Array:
        return j * self.blocks.key + jnp.arange(self.blocks.key)

    def load_keys(self, ref: Any, j: Any, masked: bool) -> jax.Array:
        """Without what lies beyond the last query: there even a weight of 0 may meet NaN."""
        ref = ref.at[pl.ds(j * self.blocks.key, self.blocks.key), :]
        return triton.load(ref, mask=(self.keys(j) < self.num_keys)[:, None], other=0) if masked else triton.load(ref)

    def visible(self, j: Any, variant: int) -> jax.Array:
        """bool [queries, keys] of the tile's meeting with key block j."""
        keys = self.keys(j)
        seen = _visible(self.static, variant, self.positions[:, None], keys[None], self.window)
        seen &= (keys < self.num_keys)[None]
        if self.segments is not None:
            ref = self.key_segments_ref.at[pl.ds(j * self.blocks.key, self.blocks.key)]
            seen &= self.segments[:, None] == triton.load(ref, mask=keys < self.num_keys, other=NO_KEY)[None]
        return seen

    def loop(self, variant: int, step: Callable[..., Any], carry: Any) -> Any:
        """step(key block, carry, masked) over the blocks that some query of the tile sees by this rotation."""
        some, every = [0, self.last + 1], [0, self.first + 1]
        if self.static.windowed:
            some[0], every[0] = self.first - self.window + 1, self.last - self.window + 1
        if chunk := self.static.chunk_length:
            first, last = _div(self.first, chunk), _div(self.last, chunk)
            if variant < 2:
                some[0] = jnp.maximum(some[0], (first - variant) * chunk)
                every[0] = jnp.maximum(every[0], (last - variant) * chunk)
            if variant > 0:
                some[1], every[1] = (last - variant + 1) * chunk, (first - variant + 1) * chunk
        some[1], every[1] = jnp.minimum(some[1], self.num_keys), jnp.minimum(every[1], self.num_keys)
        if self.segments is not None:
            some = [jnp.maximum(some[0], self.reach[0]), jnp.minimum(some[1], self.reach[1])]
        head = self.static.windowed or self.static.split_tiles
        tail = head or variant == 0
        return _loop(some, every, self.blocks.key, self.segments is not None, head, tail, step, carry)


class _KeyTile:
    """A tile of keys and how it meets the queries."""

    def __init__(self, static: _Static, blocks: Blocks, shape: _Shape, scalars: Any, segment_refs: list[Any]) -> None:
        self.static, self.blocks, self.shape = static, blocks, shape
        batch = pl.program_id(2)
        self.offset, self.window = scalars[batch, 0], scalars[batch, 1]
        self.first = pl.program_id(1) * blocks.key
        self.last = jnp.minimum(self.first + blocks.key, shape.keys) - 1
        self.keys = self.first + jnp.arange(blocks.key)
        self.real = self.keys < shape.keys
        self.segments: Any = None
        if segment_refs:
            self.query_segments_ref, key_segments_ref, reach_ref = segment_refs
            self.segments = triton.load(key_segments_ref, mask=self.real, other=NO_KEY)
            self.reach = reach_ref[0], reach_ref[1]

    def inside(self, i: Any) -> jax.Array:
        return i * self.blocks.query + jnp.arange(self.blocks.query) < self.shape.queries

    def load_rows(self, ref: Any, i: Any, masked: bool) -> jax.Array:
        if not masked:
            return triton.load(ref)
        inside = self.inside(i)
        return triton.load(ref, mask=inside[:, None] if len(ref.shape) == 2 else inside, other=0)

    def visible(self, i: Any, variant: int) -> jax.Array:
        """bool [keys, queries] of the tile's meeting with query block i."""
        inside = self.inside(i)
        queries = self.offset + i * self.blocks.query + jnp.arange(self.blocks.query)
        seen = _visible(self.static, variant, queries[None], self.keys[:, None], self.window) & inside[None]
        if self.segments is not None:
            ref = self.query_segments_ref.at[pl.ds(i * self.blocks.query, self.blocks.query)]
            seen &= self.segments[:, None] == triton.load(ref, mask=inside, other=NO_QUERY)[None]
        return seen

    def loop(self, variant: int, step: Callable[..., Any], carry: Any) -> Any:
        """step(query block, carry, masked) over the blocks in which some query sees the tile by this rotation."""
        end = self.offset + self.shape.queries
        some, every = [self.first, end], [self.last, end]
        if self.static.windowed:
            some[1] = jnp.minimum(end, self.last + self.window)
            every[1] = jnp.minimum(end, self.first + self.window)
        if chunk := self.static.chunk_length:
            first, last = _div(self.first, chunk), _div(self.last, chunk)
            if variant > 0:
                some[0], every[0] = (first + variant) * chunk, (last + variant) * chunk
            if variant < 2:
                some[1] = jnp.minimum(some[1], (last + variant + 1) * chunk)
                every[1] = jnp.minimum(every[1], (first + variant + 1) * chunk)
        some, every = ([x - self.offset for x in span] for span in (some, every))
        if self.segments is not None:
            some = [jnp.maximum(some[0], self.reach[0]), jnp.minimum(some[1], self.reach[1])]
        both = self.static.windowed or self.static.split_tiles
        head, tail = both or variant == 0, both or self.shape.queries % self.blocks.query != 0
        return _loop(some, every, self.blocks.query, self.segments is not None, head, tail, step, carry)


def _loop(
    some: list[Any],
    every: list[Any],
    size: int,
    all_masked: bool,
    head: bool,
    tail: bool,
    step: Callable[..., Any],
    carry: Any,
) -> Any:
    """step(block, carry, masked) over the blocks of positions [some): without a mask where they lie in [every).

    `head` and `tail` say whether there can be blocks before and after those without a mask.
    """

    def run(start: Any, stop: Any, masked: bool, carry: Any) -> Any:
        return lax.fori_loop(start, stop, lambda i, carry: step(i, carry, masked), carry)

    start, stop = _div(some[0], size), _div(some[1] + size - 1, size)
    if all_masked:
        return run(start, stop, True, carry)
    stop = jnp.maximum(start, stop)
    whole = jnp.clip(_div(every[0] + size - 1, size), start, stop)
    rest = jnp.clip(_div(every[1], size), whole, stop)
    if head:
        carry = run(start, whole, True, carry)
    carry = run(whole, rest, False, carry)
    return run(rest, stop, True, carry) if tail else carry


def _visible(static: _Static, variant: int, queries: jax.Array, keys: jax.Array, window: Any) -> jax.Array:
    seen = keys <= queries
    if static.windowed:
        seen &= keys > queries - window
    if static.chunk_length:
        back = _div(queries, static.chunk_length) - _div(keys, static.chunk_length)
        seen &= back == variant if variant < 2 else back >= 2
    return seen


class _Specs:
    """How the arrays lie before the programs; programs are (head, block, sequence)."""

    def __init__(self, shape: _Shape, blocks: Blocks) -> None:
        self.blocks = blocks
        num_query_blocks, num_key_blocks = pl.cdiv(shape.queries, blocks.query), pl.cdiv(shape.keys, blocks.key)
        self.query_grid = shape.heads, num_query_blocks, shape.batch
        self.key_grid = shape.kv_heads, num_key_blocks, shape.batch
        variants, groups, width = shape.variants, shape.groups, shape.head_dim
        padded_queries, padded_keys = num_query_blocks * blocks.query, num_key_blocks * blocks.key

        def late(i: Any) -> Any:
            return num_query_blocks - 1 - i

        spec = pl.BlockSpec
        self.scalars = spec((shape.batch, 2), lambda h, i, b: (0, 0))
        # one head's block of queries, and all its keys
        self.query_tile = spec((variants, None, blocks.query, None, width), lambda h, i, b: (0, b, late(i), h, 0))
        self.out_tile = spec((None, blocks.query, None, width), lambda h, i, b: (b, late(i), h, 0))
        self.row_tile = spec((None, None, blocks.query), lambda h, i, b: (b, h, late(i)))
        self.keys = spec((None, None, padded_keys, width), lambda h, i, b: (b, lax.div(h, jnp.int32(groups)), 0, 0))
        # one key/value head's block of keys, and all queries of its group
        self.key_tile = spec((None, None, blocks.key, width), lambda k, j, b: (b, k, j, 0))
        self.queries = spec((variants, None, padded_queries, groups, width), lambda k, j, b: (0, b, 0, k, 0))
        self.outs = spec((None, padded_queries, groups, width), lambda k, j, b: (b, 0, k, 0))
        self.rows = spec((None, groups, padded_queries), lambda k, j, b: (b, k, 0))
        self._of_query_tile = [
            spec((None, blocks.query), lambda h, i, b: (b, late(i))),
            spec((None, padded_keys), lambda h, i, b: (b, 0)),
            spec((None, None, 2), lambda h, i, b: (b, late(i), 0)),
        ]
        self._of_key_tile = [
            spec((None, padded_queries), lambda k, j, b: (b, 0)),
            spec((None, blocks.key), lambda k, j, b: (b, j)),
            spec((None, None, 2), lambda k, j, b: (b, j, 0)),
        ]

    def segments_of_query_tile(self, segments: Any) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
        if segments is None:
            return [], []
        queries, keys = segments
        return [queries, keys, _reach(queries, keys, self.blocks.query, self.blocks.key)], self._of_query_tile

    def segments_of_key_tile(self, segments: Any) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
        if segments is None:
            return [], []
        queries, keys = segments
        return [queries, keys, _reach(keys, queries, self.blocks.key, self.blocks.query)], self._of_key_tile


def _reach(rows: jax.Array, others: jax.Array, row_block: int, other_block: int) -> jax.Array:
    """Where, along `others`, the blocks begin and end whose segments may be met by each block of `rows`: [B, n, 2]."""

    def ends(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)], mode="edge").reshape(x.shape[0], -1, size)
        return jnp.min(x, axis=-1), jnp.max(x, axis=-1)

    (low, high), (other_low, other_high) = ends(rows, row_block), ends(others, other_block)
    meet = (low[:, :, None] <= other_high[:, None]) & (high[:, :, None] >= other_low[:, None])  # [B, n, m]
    start, stop = jnp.argmax(meet, axis=-1), meet.shape[-1] - jnp.argmax(meet[..., ::-1], axis=-1)
    reach = jnp.stack([start, stop], axis=-1) * other_block
    return jnp.where(jnp.any(meet, axis=-1)[..., None], reach, 0).astype(jnp.int32)


def _shape(q: jax.Array, k: jax.Array) -> _Shape:
    variants, batch, queries, heads, head_dim = q.shape
    return _Shape(variants, batch, queries, heads, k.shape[1], k.shape[2], head_dim)


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    chunk_length: int | None,
) -> None:
    if q.ndim != (5 if chunk_length else 4) or (chunk_length and q.shape[0] != 3):
        wanted = "[3, B, T, H, h] with chunk_length" if chunk_length else "[B, T, H, h] without chunk_length"
        raise InputError(f"q has the shape {q.shape}; it must be {wanted}.")
    batch, num_queries, num_heads, head_dim = q.shape[-4:]
    if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype or (k.shape[0], k.shape[-1]) != (batch, head_dim):
        raise InputError(
            f"k {k.dtype}{k.shape} and v {v.dtype}{v.shape} must be alike, [B, K, S, h], and fit q {q.shape}."
        )
    if num_heads % k.shape[1]:
        raise InputError(f"q has {num_heads} heads, k and v {k.shape[1]}; q's must be a multiple of theirs.")
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise InputError(f"Heads are {head_dim} wide; Triton takes powers of two from 16.")
    if (query_segments is None) != (key_segments is None):
        raise InputError("Give query_segments and key_segments together, or neither.")
    if query_segments is not None and key_segments is not None:
        wanted = (batch, num_queries), (batch, k.shape[2])
        if (query_segments.shape, key_segments.shape) != wanted:
            raise InputError(
                f"Segments {query_segments.shape} and {key_segments.shape} must be {wanted[0]} and {wanted[1]}."
            )
