"""The compiled programs of an engine besides `infer.decode.decode`: a piece of one prompt, read into its pages."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from infer.decode import STATIC, DecodeState, Produced, choose, choose_of
from infer.sampling import SamplingRows
from qwen_jax.config import ModelConfig
from qwen_jax.model import Inputs, Params, forward, unembed
from qwen_jax.paged_cache import PagedCache

# Positions of a prompt whose logits are in memory at once.
SCORED = 64


class Scores(NamedTuple):
    """Of tokens [C] that follow others: log-probabilities, and the likeliest N there."""

    logprobs: jax.Array  # [C] float32
    top_tokens: jax.Array  # [C, N] int32
    top_logprobs: jax.Array  # [C, N] float32


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames="cache")
def read(
    params: Params,
    cache: PagedCache,
    tokens: jax.Array,
    count: jax.Array,
    rows: SamplingRows,
    stop_ids: jax.Array,
    targets: jax.Array | None,
    *,
    config: ModelConfig,
    vocab_size: int,
    num_top: int,
) -> tuple[PagedCache, Produced, Scores | None, jax.Array]:
    """Reads `count` of tokens [1, C] after those that the cache's one row holds, and chooses the next.

    targets: the tokens [1, C] that follow these, where they are to be scored. Returns the last one's hidden state [D]
    as well. What stands beyond `count` is written too, behind the row's end, where the next tokens overwrite it.
    """
    end = jnp.reshape(count - 1, (1,))
    out = forward(config, params, Inputs.inference(tokens), cache=cache, only=end if targets is None else None)
    assert isinstance(out.cache, PagedCache)
    scores = None
    hidden = out.hidden[:, 0]
    if targets is not None:
        hidden = jnp.take_along_axis(out.hidden, end[:, None, None], axis=1)[:, 0]
        scores = _score(config, params, out.hidden[0], targets[0], vocab_size, num_top)
    zeros = jnp.zeros(1, jnp.int32)
    state = DecodeState(out.cache, zeros, zeros, zeros + 1, zeros > 0, rows)
    _, chosen = choose(hidden, state, stop_ids, config=config, params=params, vocab_size=vocab_size, num_top=num_top)
    return out.cache, Produced(*(x[:, None] for x in chosen)), scores, hidden[0]


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames="state")
def verify(
    params: Params,
    state: DecodeState,
    drafts: jax.Array,
    stop_ids: jax.Array,
    *,
    config: ModelConfig,
    vocab_size: int,
    num_top: int,
) -> tuple[DecodeState, Produced]:
    """The tokens [B, k + 1] that would be chosen one after the other if each row went on as its drafts [B, k] do.

    Up to the first that differs from its draft they are those of `decode`: sampling sees the same tokens before, seed
    and step. What the cache holds beyond is overwritten later; the state's other parts are of no use beyond either.
    """
    tokens = jnp.concatenate([state.tokens[:, None], drafts], axis=1)
    out = forward(config, params, Inputs.inference(tokens), cache=state.cache)
    logits = unembed(config, params, out.hidden)  # at once, so that the head is read once

    # the loop does not carry the cache, which would copy it
    def one(carry: tuple[Any, ...], logits: jax.Array) -> tuple[tuple[Any, ...], tuple[jax.Array, ...]]:
        state = DecodeState(out.cache, *carry)
        state, chosen = choose_of(logits, state, stop_ids, vocab_size=vocab_size, num_top=num_top)
        return (state.tokens, state.steps, state.limits, state.done, state.rows), chosen

    begun = (state.tokens, state.steps, state.limits, state.done, state.rows)
    ended, produced = jax.lax.scan(one, begun, jnp.moveaxis(logits, 1, 0))
    state = DecodeState(out.cache, *ended)
    return state, Produced(*(jnp.moveaxis(x, 0, 1) for x in produced))


def _score(
    config: ModelConfig, params: Params, hidden: jax.Array, targets: jax.Array, vocab_size: int, num_top: int
) -> Scores:
    size = min(SCORED, len(targets))  # both are powers of two

    def some(part: tuple[jax.Array, jax.Array]) -> Scores:
        hidden, targets = part
        logits = unembed(config, params, hidden)
        logits = jnp.where(jnp.arange(logits.shape[-1])[None] < vocab_size, logits, -jnp.inf)
        logprobs = jax.nn.log_softmax(logits)
        top, ids = jax.lax.top_k(logprobs, min(num_top, vocab_size))
        return Scores(jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0], ids.astype(jnp.int32), top)

    pieces = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(some, pieces))
