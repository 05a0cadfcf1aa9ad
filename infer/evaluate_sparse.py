"""How much of full attention sparse prefill reads, head by head, and the search for budgets that read enough.

Recall is exp(log-sum-exp over what is read - log-sum-exp over everything): the share of a query's attention. The search
is Algorithm 1 of the Qwen2.5-1M report: heads below the wanted recall get more columns and diagonals, round by round.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.decode import PIECE, read_in_pieces
from qwen_jax.backend import current_backend
from qwen_jax.cache import Cache, empty_cache
from qwen_jax.config import ModelConfig, SparsePrefill
from qwen_jax.layers.attention import AttentionSpec, attend
from qwen_jax.layers.linear import Linear
from qwen_jax.layers.norm import RMSNorm
from qwen_jax.layers.rope import rotary_tables, rotate
from qwen_jax.layers.sparse import sparse_budgets
from qwen_jax.model import Params, forward


@dataclasses.dataclass(frozen=True)
class Round:
    """Recall [L, H] of these budgets [L, H] over the last piece of the text."""

    recall: np.ndarray
    vertical: np.ndarray
    slash: np.ndarray


def search(
    config: ModelConfig,
    params: Params,
    ids: np.ndarray,
    *,
    recall: float,
    columns: int,
    diagonals: int,
    step: int,
    rounds: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Round]:
    """Rounds on the text `ids` [N], the last with the budgets found; `params` unstacked.

    Every head begins with `columns` and `diagonals`; one below `recall` gets `step` more of both. `advance` is told
    how many layers were measured.
    """
    piece = min(PIECE, len(ids))
    cache, residuals = _read(params, jnp.asarray(ids, jnp.int32)[None], config=config, piece=piece)
    shape = (config.num_layers, config.num_heads)
    vertical, slash = np.full(shape, columns), np.full(shape, diagonals)
    found: list[Round] = []
    for _ in range(rounds):
        if found:
            short = found[-1].recall < recall
            if not short.any():
                break
            vertical, slash = vertical + step * short, slash + step * short
        measured = []
        for layer, layer_params in enumerate(params["layers"]):
            budget = (np.minimum(x[layer], len(ids)) for x in (vertical, slash))
            kv = (cache.k[layer], cache.v[layer])
            measured.append(np.asarray(_recall(layer_params, residuals[layer], kv, *budget, config=config)))
            advance(1)
        found.append(Round(np.stack(measured), vertical, slash))
    return found


def as_config(found: Round, length: int) -> SparsePrefill:
    """The budgets of a round, none above the `length` of the text that they were measured on."""
    rows = (np.minimum(x, length).tolist() for x in (found.vertical, found.slash))
    vertical, slash = (tuple(map(tuple, layers)) for layers in rows)
    return SparsePrefill(vertical, slash)


@functools.partial(jax.jit, static_argnames=("config", "piece"))
def _read(params: Params, tokens: jax.Array, *, config: ModelConfig, piece: int) -> tuple[Cache, jax.Array]:
    """Keys and values of a text [1, N], densely read, and what entered each layer for the last `piece` tokens."""
    length = tokens.shape[1]
    dtype = params["embed"]["embedding"].dtype
    cache_dtype = current_backend().cache_dtype or dtype
    lengths = jnp.full(1, length, jnp.int32)
    cache = empty_cache(config, 1, length, cache_dtype, stacked=False, prompt_lengths=lengths)
    cache, _ = read_in_pieces(config, params, tokens, cache, lambda nothing, *_: nothing, jnp.zeros(()), piece=piece)
    again = cache.replace(lengths=lengths - piece)
    out = forward(config, params, tokens[:, -piece:], cache=again, return_layers=True)
    assert out.layers is not None
    return cache, out.layers


@functools.partial(jax.jit, static_argnames="config")
def _recall(
    params: Params,
    x: jax.Array,
    kv: tuple[jax.Array, jax.Array],
    vertical: jax.Array,
    slash: jax.Array,
    *,
    config: ModelConfig,
) -> jax.Array:
    """Mean recall [H] of one layer for the last queries, from the residual stream x [1, n, D] that enters it."""
    c, length = config, kv[0].shape[2]
    positions = length - x.shape[1] + jnp.arange(x.shape[1])[None]
    lengths = jnp.full(1, length, jnp.int32)
    dual = c.dual_chunk is not None and length > c.dual_chunk.chunk_length
    normed = RMSNorm(c.rms_norm_eps, "embed").apply({"params": params["attention_norm"]}, x)
    project = Linear((c.num_heads, c.head_dim), (c.hidden_size,), ("heads", "head_dim"), ("embed",), c.qkv_bias)
    q: Any = project.apply({"params": params["attention"]["q"]}, normed)
    if c.qk_norm:
        q = RMSNorm(c.rms_norm_eps, "head_dim").apply({"params": params["attention"]["q_norm"]}, q)
    turns = rotary_tables(c, positions, lengths, dual_chunk=dual, sparse=True).query
    turned = [rotate(q, tables) for tables in turns]
    chunk_length = c.dual_chunk.chunk_length if c.dual_chunk and dual else None
    spec = AttentionSpec(positions, jnp.arange(length)[None], chunk_length=chunk_length)
    every = SparsePrefill(((length,) * c.num_heads,), ((length,) * c.num_heads,))  # as wide as the arrays may get
    budget = sparse_budgets(every, lengths, positions).of_layer(0).replace(vertical=vertical, slash=slash)
    _, dense = attend(jnp.stack(turned[:3]) if dual else turned[0], *kv, spec)
    _, sparse = attend(jnp.stack(turned) if dual else turned[0], *kv, spec.replace(sparse=budget))
    return jnp.mean(jnp.exp(sparse - dense), axis=(0, 2))
