"""Perplexity of a text at several lengths of context."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from infer.decode import PIECE, new_cache, read_in_pieces
from qwen_jax.config import ModelConfig
from qwen_jax.model import Params, unembed

# Logits that are held at once, in rows of the vocabulary's width.
LOGIT_ROWS = 256
# Short windows are read together, up to so many tokens.
BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """`nll` in nats per token, its standard error over windows (nan for one window), tokens scored."""

    length: int
    nll: float
    standard_error: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


def measure(
    config: ModelConfig,
    params: Params,
    ids: np.ndarray,
    length: int,
    *,
    stride: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Perplexity:
    """Perplexity of the text `ids` [N] read in windows of `length` tokens, one every `stride` (default: `length`).

    Of each window the last `stride` tokens are scored, less the first token of all, which has nothing before it.
    `advance` is told how many tokens were read.
    """
    stride = stride or length
    windows = np.lib.stride_tricks.sliding_window_view(ids, length)[::stride].astype(np.int32)
    scored = min(stride, length - 1)
    rows = min(max(1, BATCH_TOKENS // length), len(windows))
    sums = []
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows]
        filled = np.resize(batch, (rows, length))  # the last batch repeats itself
        nll = np.asarray(negative_log_likelihood(params, filled, np.int32(length - scored), config=config))
        sums.append(nll[: len(batch)])
        advance(batch.size)
    means = np.concatenate(sums).astype(np.float64) / scored
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Perplexity(length, float(means.mean()), float(error), len(means) * scored)


@functools.partial(jax.jit, static_argnames="config")
def negative_log_likelihood(params: Params, tokens: jax.Array, first: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Sum over tokens[:, first:] of -log p(token | those before it in its row), float32 [B], in nats.

    tokens [B, T] int32. Runs what is done at inference for sequences of T tokens, in pieces if T is long.
    """
    batch, length = tokens.shape
    piece = min(PIECE, length)
    cache = new_cache(config, params, jnp.full(batch, length, jnp.int32), length)
    targets = jnp.pad(tokens[:, 1:], [(0, 0), (0, piece)])

    def visit(total: jax.Array, hidden: jax.Array, start: jax.Array) -> jax.Array:
        wanted = lax.dynamic_slice_in_dim(targets, start, piece, axis=1)
        index = start + jnp.arange(piece) + 1  # of the target
        counts = jnp.broadcast_to((index >= first) & (index < length), wanted.shape)

        def score() -> jax.Array:
            return jnp.sum(jnp.where(counts, token_nll(config, params, hidden, wanted), 0.0), axis=1)

        return total + lax.cond(jnp.any(counts), score, lambda: jnp.zeros(batch))  # logits only where they are needed

    return read_in_pieces(config, params, tokens, cache, visit, jnp.zeros(batch), piece=piece)[1]


def token_nll(config: ModelConfig, params: Params, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target), float32 [B, T], of hidden states [B, T, D] and targets [B, T].

    A block of rows at a time: all logits at once would be gigabytes.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    more = -len(wanted) % LOGIT_ROWS
    flat, wanted = jnp.pad(flat, [(0, more), (0, 0)]), jnp.pad(wanted, (0, more))

    def block(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = unembed(config, params, rows[0])  # [rows, V]
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, rows[1][:, None], axis=-1)[:, 0]

    nll = lax.map(block, (flat.reshape(-1, LOGIT_ROWS, flat.shape[-1]), wanted.reshape(-1, LOGIT_ROWS)))
    return nll.reshape(-1)[: targets.size].reshape(targets.shape)
