"""Rows that lie group by group, cut into blocks of rows of one group."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowBlocks(NamedTuple):
    """Blocks in the order of their rows; int32, those from `number` on are empty."""

    group: jax.Array  # [n]
    start: jax.Array  # [n] first row
    count: jax.Array  # [n] rows of the group
    number: jax.Array  # [] blocks that are not empty


def block_size(num_rows: int, num_groups: int, smallest: int, largest: int) -> int:
    """A power of two within bounds that is near the rows of a group: few blocks, and few rows that are none."""
    return min(largest, max(smallest, 1 << (num_rows // num_groups).bit_length()))


def row_blocks(num_rows: int, group_sizes: jax.Array, size: int) -> RowBlocks:
    """Groups of `group_sizes` int [E] rows, one after another, in blocks of at most `size` rows of one group."""
    num_groups = len(group_sizes)
    first_row = jnp.cumsum(group_sizes) - group_sizes
    blocks_to = jnp.cumsum((group_sizes + size - 1) // size)  # blocks up to and with each group
    index = jnp.arange(min(num_rows, num_rows // size + num_groups))  # no more than are ever needed
    group = jnp.minimum(jnp.sum(index[:, None] >= blocks_to[None], axis=1), num_groups - 1)
    before = jnp.where(group > 0, blocks_to[group - 1], 0)
    done = (index - before) * size
    count = jnp.where(index < blocks_to[-1], jnp.clip(group_sizes[group] - done, 0, size), 0)
    parts = (group, first_row[group] + done, count, blocks_to[-1])
    return RowBlocks(*(part.astype(jnp.int32) for part in parts))
