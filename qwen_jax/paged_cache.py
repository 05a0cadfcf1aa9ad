"""A KV cache of pages, of which rows hold as many as they need and may share those that neither writes to."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels.choice import attend_pages
from qwen_jax.kernels.pages import Pages
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.layers.sparse import SparseBudget
from qwen_jax.sharding import current_mesh
from qwen_jax.unstacked import Unstacked


class PagedCache(flax.struct.PyTreeNode):
    """The token at place p of row b lies in slot p % P of page `tables[b, p // P]`.

    Every layer has its own buffers, and the pages that new tokens fall into are read, merged and written back whole:
    XLA:TPU copies the cache for a scatter of tokens, and for one of whole pages into all layers at once. Entries of a
    table beyond a row's length may hold anything.
    """

    layers: Unstacked  # of Pages
    tables: jax.Array  # [B, M] int32
    lengths: jax.Array  # [B] int32
    prompt_lengths: jax.Array  # [B] int32

    @property
    def capacity(self) -> int:
        """Tokens that a row's table has entries for, M P."""
        return self.tables.shape[1] * self.layers[0].size

    def write(self, layer: jax.Array | int, k: jax.Array, v: jax.Array, start: jax.Array | int) -> PagedCache:
        here = _of(self.layers, layer).written(self.tables, k, v, start)
        return self.replace(layers=self.layers.with_layer(int(layer), here))

    def attend(
        self, layer: jax.Array | int, q: jax.Array, spec: AttentionSpec, budget: SparseBudget | None = None
    ) -> jax.Array:
        if budget is not None:
            raise InputError("sparse prefill reads a contiguous cache; set sparse_attention_enabled to false.")
        if current_mesh() is not None:
            raise InputError("a paged cache lies on one device; use a contiguous one on a mesh.")
        return attend_pages(q, _of(self.layers, layer), self.tables, spec)


def _of(layers: Unstacked, layer: jax.Array | int) -> Pages:
    if not isinstance(layer, int):
        raise InputError("a paged cache has its own buffers for every layer; unstack the parameters.")
    return layers[layer]


def paged_cache(
    config: ModelConfig, num_pages: int, page: int, dtype: DTypeLike, *, tables: jax.Array, prompt_lengths: jax.Array
) -> PagedCache:
    """An empty cache of `num_pages` pages of `page` tokens, in int8 with a float32 scale for each key and head if
    `dtype` is that. tables [B, M] int32, prompt_lengths [B] int32."""
    shape = (config.num_kv_heads, num_pages, page, config.head_dim)

    def zeros() -> Pages:
        scales = [None, None]
        if jnp.dtype(dtype) == jnp.int8:
            scales = [jnp.zeros((num_pages, config.num_kv_heads, page)) for _ in scales]
        return Pages(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)

    layers = Unstacked(zeros() for _ in range(config.num_layers))
    return PagedCache(layers, tables, jnp.zeros(tables.shape[0], jnp.int32), prompt_lengths)


def page_bytes(config: ModelConfig, page: int, dtype: DTypeLike) -> int:
    """Bytes of one page of all layers."""
    nothing = jnp.zeros((1, 1), jnp.int32)
    cache = jax.eval_shape(lambda: paged_cache(config, 1, page, dtype, tables=nothing, prompt_lengths=nothing[0]))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
