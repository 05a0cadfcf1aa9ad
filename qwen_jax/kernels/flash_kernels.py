"""The two kernels of flash attention and how they are called.

Scores are held transposed, [keys, queries]: a query is a lane, so its running maximum and sum are rows, reductions run
over sublanes, and nothing is broadcast along lanes. One grid step is one tile of queries and keys for all the query
heads of a key/value head. The backward pass is one kernel of five matrix products, not two of seven: the gradients of
a whole span of keys stay in VMEM while the queries pass by.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.flash_tiles import FIRST, KEY, LAST, LIVE, MASKED, QUERY, VARIANT, VARIANTS, Extent, tiles

LANES = 128
# A row that sees no key keeps this maximum; a score that is masked lies so far below that exp2 of it is 0 even then.
NOTHING, HIDDEN = -1e30, -1e38
LOG2_E = math.log2(math.e)
MOST_ROWS = 4096  # queries of all the heads of a tile, which lie in VMEM together


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a tile, the keys of it that one matrix product takes, and that one mask is made for."""

    query: int
    key: int
    step: int
    masked_step: int

    def fit(self, num_queries: int, num_keys: int, groups: int) -> "Blocks":
        """The smallest blocks of whole lanes that are no more in number, so that short lengths divide evenly."""
        most = max(MOST_ROWS // groups // LANES, 1) * LANES

        def smallest(length: int, largest: int) -> int:
            return -(-length // (-(-length // largest) * LANES)) * LANES

        query, key = smallest(num_queries, min(self.query, most)), smallest(num_keys, self.key)
        masked_step = math.gcd(self.masked_step, key)
        return Blocks(query, key, math.gcd(self.step, masked_step), masked_step)


@dataclass(frozen=True)
class Static:
    """What the kernels are specialised on."""

    scale: float  # of the scores
    width_axis: int  # of a head's queries: 0 is [h, T], 1 is [T, h]
    window: int | None
    chunk_length: int | None
    offset: int | None  # None: traced
    forward: Blocks
    backward: Blocks
    span: int
    parts: int  # of the queries, for cores that would else have nothing to do
    vmem_limit_bytes: int
    interpret: Any

    def params(self) -> pltpu.CompilerParams:
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=self.vmem_limit_bytes,
        )


class Walk:
    """The tiles of an attention, the blocks of its arrays at each of them, and inside a kernel the current tile."""

    def __init__(
        self,
        static: Static,
        blocks: Blocks,
        key_start: int,
        num_queries: int,
        num_keys: int,
        offset: jax.Array,
        query_segments: jax.Array | None,
        key_segments: jax.Array | None,
        per_variant: bool,
    ) -> None:
        self.blocks, self.width_axis, self.segmented = blocks, static.width_axis, query_segments is not None
        self.extent = Extent(
            blocks.query, blocks.key, num_queries, num_keys, static.window, static.chunk_length, key_start
        )
        segments = pad(query_segments, blocks.query), pad(key_segments, blocks.key)
        table, self.steps = tiles(
            self.extent, offset if static.offset is None else static.offset, *segments, per_variant, static.parts
        )
        self.table_shape = table.shape
        self.scalars = table.reshape(-1), offset
        self.segments = [x[:, None] for x in segments if x is not None]  # [B, 1, length]

    def word(self, table_ref: Any, b: Any, part: Any, step: Any) -> Any:
        """The tile of a grid step; the rows of a batch share a table of one row."""
        rows, parts, width = self.table_shape
        return table_ref[((0 if rows == 1 else b) * parts + part) * width + step]

    def spec(self, block: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
        """index(batch row, key/value head, query block, variant, key block) -> the block of an array at a grid step."""

        def index_map(b: Any, kv: Any, part: Any, step: Any, table_ref: Any, _: Any) -> Any:
            word = self.word(table_ref, b, part, step)
            return index(b, kv, word >> QUERY, _field(word, VARIANT, KEY), _field(word, KEY, QUERY))

        return pl.BlockSpec(block, index_map)

    def queries(self, groups: int, head_dim: int, variants: bool) -> pl.BlockSpec:
        """Of an array [N, B, K, G, T, h], or without the N: [G, queries, h], or [G, h, queries] if it lies so."""
        block = (groups, self.blocks.query, head_dim) if self.width_axis else (groups, head_dim, self.blocks.query)

        def index(b: Any, kv: Any, i: Any, variant: Any, j: Any) -> Any:
            place = (b, kv, 0, i, 0) if self.width_axis else (b, kv, 0, 0, i)
            return (variant, *place) if variants else place

        return self.spec((*[None] * (3 if variants else 2), *block), index)

    def rows(self, groups: int) -> pl.BlockSpec:
        """Of an array [B, K, G, 1, T]."""
        return self.spec((None, None, groups, 1, self.blocks.query), lambda b, kv, i, v, j: (b, kv, 0, 0, i))

    def keys(self, head_dim: int) -> pl.BlockSpec:
        """Of an array [B, K, S, h]."""
        return self.spec((None, None, self.blocks.key, head_dim), lambda b, kv, i, v, j: (b, kv, j, 0))

    def segment_specs(self) -> list[pl.BlockSpec]:
        specs = [
            self.spec((None, 1, self.blocks.query), lambda b, kv, i, v, j: (b, 0, i)),
            self.spec((None, 1, self.blocks.key), lambda b, kv, i, v, j: (b, 0, j)),
        ]
        return specs if self.segmented else []

    def tile(self, table_ref: Any, offset_ref: Any) -> "Tile":
        b = pl.program_id(0)
        word = self.word(table_ref, b, pl.program_id(2), pl.program_id(3))
        offset = offset_ref[0 if offset_ref.shape[0] == 1 else b]
        return Tile(self.blocks, self.extent, word, offset + (word >> QUERY) * self.blocks.query)


@dataclass(frozen=True)
class Tile:
    """One grid step's tile, as its word in the table tells it."""

    blocks: Blocks
    extent: Extent
    word: Any
    first_query: Any  # the key that the tile's first query stands at

    def has(self, flag: int) -> Any:
        return self.word & flag != 0

    @property
    def first_key(self) -> Any:
        return _field(self.word, KEY, QUERY) * self.blocks.key

    def run(self, groups: int, products: Any, accumulate: Any, bias_ref: Any, segment_refs: Any) -> None:
        """Calls accumulate(g, scores, other products, first key in the tile, number of keys) for all the tile's scores.

        products(g, first key in the tile, number of keys) -> (scores, other products).
        """
        step, masked_step = self.blocks.step, self.blocks.masked_step

        def sweep(start: Any, size: int, masked: bool) -> None:
            @pl.loop(0, groups)
            def _(g: Any) -> None:
                current: Any = products(g, start, step)
                for at in range(0, size, step):
                    # asked for before it is needed: the matrix unit works on it during this step's softmax
                    following = products(g, start + at + step, step) if at + step < size else None
                    scores, other = current
                    accumulate(g, scores + bias_ref[pl.ds(at, step)] if masked else scores, other, start + at, step)
                    current = following

        @pl.when(self.word & (LIVE | MASKED) == LIVE)
        def _() -> None:
            sweep(0, self.blocks.key, masked=False)

        @pl.when(self.has(MASKED))
        def _() -> None:
            # the parts between the first key that the window of the first query shows and the last query's own
            before = self.first_query - self.first_key
            last = jnp.minimum((before + self.blocks.query - 1) // masked_step, self.blocks.key // masked_step - 1)
            window = self.extent.window
            first = 0 if window is None else jnp.maximum(before - window + 1, 0) // masked_step

            @pl.loop(first, last + 1)
            def _(i: Any) -> None:
                start = pl.multiple_of(i * masked_step, masked_step)
                bias = self.bias(start, segment_refs)
                bias_ref[...] = bias

                # the table knows nothing smaller than a tile of where one document ends and another begins
                @pl.when(jnp.max(bias) == 0 if segment_refs else True)
                def _() -> None:
                    sweep(start, masked_step, masked=True)

    def bias(self, start: Any, segment_refs: Any) -> jax.Array:
        """0 where a query may see a key and HIDDEN where not: [masked_step, queries], from key `start` of the tile."""
        blocks, extent = self.blocks, self.extent
        shape = (blocks.masked_step, blocks.query)
        query = self.first_query + lax.broadcasted_iota(jnp.int32, (1, blocks.query), 1)
        key = self.first_key + start + lax.broadcasted_iota(jnp.int32, shape, 0)
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
            same, latest = variant == 0, variant == VARIANTS - 1
            low = jnp.maximum(low, jnp.where(same, chunk, jnp.where(latest, low, chunk - length)))
            high = jnp.minimum(high, jnp.where(same, high, jnp.where(latest, chunk - length, chunk)))
        seen = (key >= low) & (key < high)
        if segment_refs:
            query_segments, key_segments = segment_refs
            # a row of lanes becomes a column of sublanes
            column = jnp.broadcast_to(key_segments[:, pl.ds(start, shape[0])], (LANES, shape[0])).T
            column = jnp.tile(column, (1, blocks.query // LANES))
            seen &= (column == query_segments[...]) & (column != 0)
        return jnp.where(seen, 0.0, HIDDEN)


def forward(
    static: Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """q [N, B, K, G, T, h], or [N, B, K, G, h, T], k and v [B, K, S, h] -> (out like q without N, [B, K, G, 1, T]).

    The second, in float32, is the logarithm to base 2 of the softmax's denominators.
    """
    blocks, time_axis = static.forward, q.ndim - 1 - static.width_axis
    num_queries, head_dim = q.shape[time_axis], k.shape[3]
    batch, num_kv_heads, groups = q.shape[1:4]
    walk = Walk(static, blocks, 0, num_queries, k.shape[2], offset, query_segments, key_segments, per_variant=False)
    q, k = pad(q, blocks.query, time_axis), pad(k, blocks.key, 2)
    v = pad(jnp.swapaxes(v, 2, 3), blocks.key)
    values_spec = walk.spec((None, None, head_dim, blocks.key), lambda b, kv, i, v, j: (b, kv, 0, j))
    row = pltpu.VMEM((groups, 1, blocks.query), jnp.float32)
    out, log2_sum = pl.pallas_call(
        functools.partial(_forward_kernel, static, walk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk.scalars),
            grid=(batch, num_kv_heads, static.parts, walk.steps),
            in_specs=[
                walk.queries(groups, head_dim, variants=True),
                walk.keys(head_dim),
                values_spec,
                *walk.segment_specs(),
            ],
            out_specs=[walk.queries(groups, head_dim, variants=False), walk.rows(groups)],
            scratch_shapes=[
                row,
                row,
                pltpu.VMEM((groups, head_dim, blocks.query), jnp.float32),
                pltpu.VMEM((blocks.masked_step, blocks.query), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape[1:], q.dtype),
            jax.ShapeDtypeStruct((batch, num_kv_heads, groups, 1, q.shape[time_axis]), jnp.float32),
        ],
        compiler_params=static.params(),
        interpret=static.interpret,
        name="flash_forward",
    )(*walk.scalars, q, k, v, *walk.segments)
    return lax.slice_in_dim(out, 0, num_queries, axis=time_axis - 1), log2_sum[..., :num_queries]


def _forward_kernel(static: Static, walk: Walk, table_ref: Any, offset_ref: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, *segment_refs = refs[:-6]
    out_ref, log2_sum_ref, max_ref, sum_ref, acc_ref, bias_ref = refs[-6:]
    tile, groups, precision = walk.tile(table_ref, offset_ref), q_ref.shape[0], _precision(q_ref.dtype)

    @pl.when(tile.has(FIRST))
    def _() -> None:
        max_ref[...] = jnp.full_like(max_ref, NOTHING)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def products(g: Any, start: Any, size: int) -> tuple[jax.Array, None]:
        """Scores [size, queries] of keys `start` onwards, as exponents of 2."""
        scores = _dot(k_ref[pl.ds(start, size)], q_ref[g], 1, static.width_axis, precision)
        return scores * (static.scale * LOG2_E), None

    def accumulate(g: Any, scores: jax.Array, _: None, start: Any, size: int) -> None:
        highest = jnp.maximum(max_ref[g], jnp.max(scores, axis=0, keepdims=True))
        shrink = jnp.exp2(max_ref[g] - highest)
        weights = jnp.exp2(scores - highest)
        max_ref[g] = highest
        sum_ref[g] = sum_ref[g] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        values = v_ref[:, pl.ds(start, size)]
        acc_ref[g] = acc_ref[g] * shrink + _dot(values, weights.astype(values.dtype), 1, 0, precision)

    tile.run(groups, products, accumulate, bias_ref, segment_refs)

    @pl.when(tile.has(LAST))
    def _() -> None:
        @pl.loop(0, groups)
        def _(g: Any) -> None:
            total = jnp.where(sum_ref[g] == 0, 1.0, sum_ref[g])
            out = (acc_ref[g] * (1 / total)).astype(out_ref.dtype)
            out_ref[g] = out.T if static.width_axis else out
            log2_sum_ref[g] = max_ref[g] + jnp.log2(total)


def backward(
    static: Static,
    key_start: int,
    dq: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    d_out: jax.Array,
    log2_sum: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from the keys given, of which the first is key `key_start` of all.

    Shapes as in `forward`; delta [B, K, G, 1, T]. All the keys' gradients are held in VMEM. With float32 `dq`, the
    result is that plus this gradient of q.
    """
    blocks, time_axis = static.backward, q.ndim - 1 - static.width_axis
    num_queries, head_dim, num_keys = q.shape[time_axis], k.shape[3], k.shape[2]
    batch, num_kv_heads, groups = q.shape[1:4]
    walk = Walk(
        static, blocks, key_start, num_queries, num_keys, offset, query_segments, key_segments, per_variant=True
    )
    q, d_out = pad(q, blocks.query, time_axis), pad(d_out, blocks.query, time_axis - 1)
    k, v, delta = pad(k, blocks.key, 2), pad(v, blocks.key, 2), pad(delta, blocks.query)
    log2_sum = pad(log2_sum, blocks.query, value=-NOTHING)  # so that queries which are not there weigh nothing
    queries_spec, keys_spec = walk.queries(groups, head_dim, variants=True), walk.keys(head_dim)
    in_hbm, all_keys = pl.BlockSpec(memory_space=pl.ANY), pltpu.VMEM(k.shape[2:], jnp.float32)
    parts_dtype = k.dtype if static.parts == 1 else jnp.float32
    added = [] if dq is None else [pad(dq, blocks.query, time_axis)]
    inputs = [q, k, v, d_out, log2_sum, delta, *walk.segments, *added]
    new_dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, static, walk, bool(added)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk.scalars),
            grid=(batch, num_kv_heads, static.parts, walk.steps),
            in_specs=[
                queries_spec,
                keys_spec,
                keys_spec,
                walk.queries(groups, head_dim, variants=False),
                walk.rows(groups),
                walk.rows(groups),
                *walk.segment_specs(),
                *[queries_spec for _ in added],
            ],
            out_specs=[queries_spec, in_hbm, in_hbm],
            scratch_shapes=[
                pltpu.VMEM((groups, head_dim, blocks.query), jnp.float32),
                all_keys,
                all_keys,
                pltpu.VMEM((blocks.key, head_dim), parts_dtype),
                pltpu.VMEM((blocks.masked_step, blocks.query), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32 if added else q.dtype),
            *[jax.ShapeDtypeStruct((static.parts, *k.shape), parts_dtype)] * 2,
        ],
        input_output_aliases={len(walk.scalars) + len(inputs) - 1: 0} if added else {},
        compiler_params=static.params(),
        interpret=static.interpret,
        name="flash_backward",
    )(*walk.scalars, *inputs)
    dk, dv = (jnp.sum(x, axis=0).astype(k.dtype)[:, :, :num_keys] for x in (dk, dv))
    return lax.slice_in_dim(new_dq, 0, num_queries, axis=time_axis), dk, dv


def _backward_kernel(static: Static, walk: Walk, adds: bool, table_ref: Any, offset_ref: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, d_out_ref, log2_sum_ref, delta_ref, *optional_refs = refs[:-8]
    dq_ref, dk_ref, dv_ref, dq_acc_ref, dk_acc_ref, dv_acc_ref, written_ref, bias_ref = refs[-8:]
    segment_refs = optional_refs[:2] if walk.segmented else []
    tile, groups, precision = walk.tile(table_ref, offset_ref), q_ref.shape[0], _precision(q_ref.dtype)
    width, place = static.width_axis, (pl.program_id(2), pl.program_id(0), pl.program_id(1))

    def key_blocks(body: Any) -> None:
        @pl.loop(0, dk_acc_ref.shape[0] // walk.blocks.key)
        def _(i: Any) -> None:
            body(pl.ds(pl.multiple_of(i * walk.blocks.key, walk.blocks.key), walk.blocks.key))

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        @key_blocks
        def _(keys: Any) -> None:
            dk_acc_ref[keys] = jnp.zeros_like(dk_acc_ref[keys])
            dv_acc_ref[keys] = jnp.zeros_like(dv_acc_ref[keys])

    @pl.when(tile.has(FIRST))
    def _() -> None:
        dq_acc_ref[...] = jnp.zeros_like(dq_acc_ref)

    def products(g: Any, start: Any, size: int) -> tuple[jax.Array, jax.Array]:
        """Scores as exponents of 2 and the gradients of the weights, both [size, queries], of keys `start` onwards."""
        keys = pl.ds(start, size)
        scores = _dot(k_ref[keys], q_ref[g], 1, width, precision) * (static.scale * LOG2_E)
        return scores, _dot(v_ref[keys], d_out_ref[g], 1, width, precision)

    def accumulate(g: Any, scores: jax.Array, d_weights: jax.Array, start: Any, size: int) -> None:
        weights = jnp.exp2(scores - log2_sum_ref[g])
        d_scores = (weights * (d_weights - delta_ref[g])).astype(q_ref.dtype)
        rows = pl.ds(pl.multiple_of(tile.first_key + start, size), size)
        dv_acc_ref[rows] += _dot(weights.astype(q_ref.dtype), d_out_ref[g], 1, 1 - width, precision)
        dk_acc_ref[rows] += _dot(d_scores, q_ref[g], 1, 1 - width, precision)
        dq_acc_ref[g] += _dot(k_ref[pl.ds(start, size)], d_scores, 0, 0, precision)

    tile.run(groups, products, accumulate, bias_ref, segment_refs)

    @pl.when(tile.has(LAST))
    def _() -> None:
        @pl.loop(0, groups)
        def _(g: Any) -> None:
            dq = dq_acc_ref[g] * static.scale
            dq = dq.T if width else dq
            if adds:
                dq += optional_refs[-1][g]
            dq_ref[g] = dq.astype(dq_ref.dtype)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        # by hand: blocks of the pipeline would hold them twice more in VMEM
        @key_blocks
        def _(keys: Any) -> None:
            for acc_ref, scale, out_ref in ((dk_acc_ref, static.scale, dk_ref), (dv_acc_ref, 1.0, dv_ref)):
                written_ref[...] = (acc_ref[keys] * scale).astype(written_ref.dtype)
                pltpu.sync_copy(written_ref, out_ref.at[*place, keys])


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, precision: Any) -> jax.Array:
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _precision(dtype: Any) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _field(word: Any, begin: int, end: int) -> Any:
    return (word >> begin) & ((1 << (end - begin)) - 1)


def pad(x: Any, block: int, axis: int = -1, value: float = 0) -> Any:
    """The array, if any, with `value` up to a whole number of blocks."""
    if x is None:
        return None
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, width, constant_values=value)
