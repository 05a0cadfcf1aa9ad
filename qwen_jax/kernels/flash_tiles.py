"""Which (query block, key block) tiles of an attention are visited, in what order and whether they need a mask.

The kernels walk a list of tiles instead of a rectangular grid, so that a tile nobody sees costs neither a grid step nor
a fetch. One int32 describes a tile. The list is a constant where only shapes decide it; segments or a traced offset
make it a small computation, and the length of the grid a traced number.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import InputError

LIVE, MASKED, FIRST, LAST = 1, 2, 4, 8
VARIANT, KEY, QUERY = 4, 6, 18  # where these fields begin
MAX_BLOCKS = 1 << 12
MAX_TILES = 1 << 17  # the list lies in scalar memory, of which a core has 1 MiB
VARIANTS = 3  # of a query in Dual Chunk Attention: same chunk, next chunk, later


@dataclass(frozen=True)
class Extent:
    """The shape of an attention in blocks, and which keys a query position may see."""

    query_block: int
    key_block: int
    num_queries: int
    num_keys: int
    window: int | None = None
    chunk_length: int | None = None
    key_start: int = 0  # position of key 0, from which chunks are counted

    @property
    def num_query_blocks(self) -> int:
        return -(-self.num_queries // self.query_block)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.num_keys // self.key_block)

    @property
    def variants(self) -> int:
        return 1 if self.chunk_length is None else VARIANTS


def visible(tile: Any, extent: Extent, offset: Any) -> tuple[Any, Any]:
    """(some pair of the tile may be seen, every pair is seen) for tile (query block, variant, key block).

    Query 0 stands at key `offset`. Pairs of queries or keys past the last count as not there. For numpy and jax arrays.
    """
    query_block, variant, key_block = tile
    first_query, first_key = query_block * extent.query_block, key_block * extent.key_block
    last_query, last_key = first_query + extent.query_block - 1, first_key + extent.key_block - 1
    last_real_query, last_real_key = (
        offset + last_query.clip(max=extent.num_queries - 1),
        last_key.clip(max=extent.num_keys - 1),
    )
    first_query, last_query = offset + first_query, offset + last_query
    some = first_key <= last_real_query
    every = (last_key <= first_query) & (last_key < extent.num_keys)
    if extent.window is not None:
        some &= last_real_key > first_query - extent.window
        every &= first_key > last_query - extent.window
    if extent.chunk_length is not None:
        length = extent.chunk_length

        def variant_of(query: Any, key: Any) -> Any:
            return ((query + extent.key_start) // length - (key + extent.key_start) // length).clip(0, VARIANTS - 1)

        some &= (variant_of(first_query, last_real_key) <= variant) & (
            variant <= variant_of(last_real_query, first_key)
        )
        every &= variant_of(first_query, last_key) == variant_of(last_query, first_key)
    return some, every


def segments_meet(
    query_segments: jax.Array, key_segments: jax.Array, query_block: np.ndarray, key_block: np.ndarray, extent: Extent
) -> tuple[jax.Array, jax.Array]:
    """(the segments of a tile's queries and keys may meet, they are all one); segments are padded to whole blocks."""

    def ranges(segments: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        blocks = segments.reshape(segments.shape[0], -1, size)
        lowest = jnp.min(jnp.where(blocks == 0, np.iinfo(np.int32).max, blocks), axis=-1)  # of those not padding
        return jnp.min(blocks, axis=-1), lowest, jnp.max(blocks, axis=-1)

    least_q, lowest_q, highest_q = (x[:, query_block] for x in ranges(query_segments, extent.query_block))
    least_k, lowest_k, highest_k = (x[:, key_block] for x in ranges(key_segments, extent.key_block))
    meet = jnp.maximum(lowest_q, lowest_k) <= jnp.minimum(highest_q, highest_k)
    same = (least_q == highest_q) & (least_k == highest_k) & (least_q == least_k) & (least_q > 0)
    return meet, same


def tiles(
    extent: Extent,
    offset: int | jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    per_variant: bool,
    parts: int = 1,
) -> tuple[jax.Array, int | jax.Array]:
    """(int32 [1 or B, parts, n] tiles, how many of the n to walk), query blocks outermost, then variants, then keys.

    offset: an int, or int32 [1 or B]. A run of tiles of one query block (with `per_variant`, of one variant of it)
    begins with FIRST and ends with LAST; a run with nothing to see has one tile, without LIVE. The query blocks are
    dealt out to the parts, as many cheap as dear ones to each.
    """
    if max(extent.num_query_blocks, extent.num_key_blocks) > MAX_BLOCKS:
        raise InputError(
            f"flash attention takes at most {MAX_BLOCKS} blocks of queries and of keys, not {extent.num_query_blocks} "
            f"and {extent.num_key_blocks}; attend with fewer queries at a time or larger blocks."
        )
    shape = (extent.num_query_blocks, extent.variants, extent.num_key_blocks)
    all_tiles = np.indices(shape, dtype=np.int32).reshape(3, 1, -1)  # [query block | variant | key block, 1, n]
    if isinstance(offset, int):
        # nothing to decide later for tiles that the shape alone rules out, but for one that a run of none needs
        keep = visible(all_tiles, extent, offset)[0] | (all_tiles[2] == 0)
        all_tiles = all_tiles[:, keep][:, None]
    query_block, variant, key_block = all_tiles
    run = (query_block * extent.variants + variant if per_variant else query_block)[0]
    begins = np.searchsorted(run, run)  # where the run of each tile begins
    ends = np.searchsorted(run, run, side="right")

    static = isinstance(offset, int) and query_segments is None
    xp: Any = np if static else jnp
    where = np.int32(offset) if isinstance(offset, int) else offset[:, None]
    some, every = visible((query_block, variant, key_block), extent, where)
    if query_segments is not None and key_segments is not None:
        meet, same = segments_meet(query_segments, key_segments, query_block[0], key_block[0], extent)
        some, every = some & meet, every & same

    def before(x: Any) -> Any:
        return xp.concatenate([xp.zeros_like(x[:, :1], dtype=np.int32), xp.cumsum(x, axis=1, dtype=np.int32)], axis=1)

    seen = before(some)
    empty = seen[:, ends] == seen[:, begins]
    walked = some | (empty & (np.arange(run.size) == begins)[None])
    count = before(walked)
    first = walked & (count[:, :-1] == count[:, begins])
    last = walked & (count[:, 1:] == count[:, ends])
    words = query_block << QUERY | key_block << KEY | variant << VARIANT
    words = words | some * LIVE | (some & ~every) * MASKED | first * FIRST | last * LAST

    round_trip = query_block[0] % (2 * parts)
    owner = np.minimum(round_trip, 2 * parts - 1 - round_trip)
    walked = walked[:, None] & (owner == np.arange(parts)[:, None])[None]  # [rows, parts, n]
    words = xp.broadcast_to(xp.asarray(words, dtype=np.int32)[:, None], walked.shape)
    walks = walked.sum(axis=-1, keepdims=True)
    length = walks.max()
    # the walked ones to the front; rows with fewer idle on their last one, which is not fetched again
    table = xp.take_along_axis(words, xp.argsort(~walked, axis=-1, stable=True), axis=-1)
    idle = xp.take_along_axis(table, xp.maximum(walks - 1, 0), axis=-1) & ~np.int32(LIVE | MASKED | FIRST | LAST)
    table = xp.where(np.arange(run.size)[None, None] < walks, table, idle)
    if static:
        length = int(length)
        table = table[..., :length]
    if table.size > MAX_TILES:
        raise InputError(
            f"flash attention walks at most {MAX_TILES} tiles, and has {table.size} of {extent.query_block} queries x "
            f"{extent.key_block} keys; attend with fewer queries at a time or larger blocks."
        )
    return jnp.asarray(table), length
