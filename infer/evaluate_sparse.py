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

from infer.decode import PIECE, new_cache, read_in_pieces
from qwen_jax.cache import ContiguousCache
from qwen_jax.config import ModelConfig, SparsePrefill
from qwen_jax.kernels.choice import attend_lse
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.layers.attention import Attention
from qwen_jax.layers.norm import RMSNorm
from qwen_jax.layers.rope import Tables, rotary_tables
from qwen_jax.layers.sparse import sparse_attention, sparse_budgets
from qwen_jax.model import Inputs, Params, forward


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
            found_here = _recall(
                layer_params, residuals[layer], cache.read(layer, residuals.dtype), *budget, config=config
            )
            measured.append(np.asarray(found_here))
            advance(1)
        found.append(Round(np.stack(measured), vertical, slash))
    return found


def as_config(found: Round, length: int) -> SparsePrefill:
    """The budgets of a round, none above the `length` of the text that they were measured on."""
    rows = (np.minimum(x, length).tolist() for x in (found.vertical, found.slash))
    vertical, slash = (tuple(map(tuple, layers)) for layers in rows)
    return SparsePrefill(vertical, slash)


@functools.partial(jax.jit, static_argnames=("config", "piece"))
def _read(params: Params, tokens: jax.Array, *, config: ModelConfig, piece: int) -> tuple[ContiguousCache, jax.Array]:
    """Keys and values of a text [1, N], densely read, and what entered each layer for the last `piece` tokens."""
    length = tokens.shape[1]
    cache = new_cache(config, params, jnp.full(1, length, jnp.int32), length)
    cache, _ = read_in_pieces(config, params, tokens, cache, lambda nothing, *_: nothing, jnp.zeros(()), piece=piece)
    again = Inputs.inference(tokens[:, -piece:], start=jnp.int32(length - piece))
    out = forward(config, params, again, cache=cache, return_layers=True)
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
    length, (_, num_queries, _) = kv[0].shape[2], x.shape
    start, lengths, chunk = length - num_queries, jnp.full(1, length, jnp.int32), config.dual_chunk
    chunk_length = chunk.chunk_length if chunk and length > chunk.chunk_length else None
    positions = start + jnp.arange(num_queries)[None]
    rotary = rotary_tables(config, positions, lengths, dual_chunk=chunk_length is not None, sparse=True)
    normed = RMSNorm(config.rms_norm_eps, "norm").apply({"params": params["attention_norm"]}, x)

    def queries(turns: tuple[Tables, ...]) -> Any:
        return Attention(config).apply({"params": params["attention"]}, normed, turns, method="queries")

    spec = AttentionSpec(start, chunk_length=chunk_length)
    widest = ((length,) * config.num_heads,)  # as wide as the arrays may get
    budget = sparse_budgets(SparsePrefill(widest, widest, threshold=0), lengths, start, num_queries).of_layer(0)
    budget = budget.replace(vertical=vertical, slash=slash)
    _, dense = attend_lse(queries(rotary.attending), *kv, spec)
    _, sparse = sparse_attention(queries(rotary.query), *kv, spec, budget)
    return jnp.mean(jnp.exp(sparse - dense), axis=(0, 2))
