"""Prefill and the decode loop: compiled programs over one state that stays on the device.

Shapes are rounded up to powers of two (rows, prompt length, cache slots), so that few programs are ever compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from infer.sampling import SamplingRows, sample
from qwen_jax.cache import Cache, ContiguousCache, empty_cache
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.cpu import kept_in_loop
from qwen_jax.model import Inputs, Params, forward, unembed
from qwen_jax.unstacked import Unstacked

# Tokens that one call of the decode program can produce.
MAX_STEPS = 32
# Longer prompts are read in pieces of this many tokens, so that activations do not grow with the prompt.
PIECE = 1024

Carry = TypeVar("Carry")


class DecodeState(flax.struct.PyTreeNode):
    """Everything that changes from token to token. Donated to each call and returned by it."""

    cache: Cache
    tokens: jax.Array  # [B] int32, the last token of each row, not yet in the cache
    steps: jax.Array  # [B] int32, tokens each row has produced
    limits: jax.Array  # [B] int32, tokens each row may produce
    done: jax.Array  # [B] bool
    rows: SamplingRows | None  # None: every row takes the likeliest token


class Produced(flax.struct.PyTreeNode):
    """What a call gave: tokens and raw log-probabilities (of the unpenalised, untempered distribution)."""

    tokens: jax.Array  # [B, n] int32
    logprobs: jax.Array  # [B, n] float32
    top_tokens: jax.Array  # [B, n, N] int32, the N likeliest
    top_logprobs: jax.Array  # [B, n, N] float32


def choose(
    hidden: jax.Array,
    state: DecodeState,
    stop_ids: jax.Array,
    *,
    config: ModelConfig,
    params: Params,
    vocab_size: int,
    num_top: int,
) -> tuple[DecodeState, tuple[jax.Array, ...]]:
    """Turns hidden states [B, D] into each row's next token and what is reported of it.

    stop_ids: of all rows [n], or of each [B, n].
    """
    return choose_of(unembed(config, params, hidden), state, stop_ids, vocab_size=vocab_size, num_top=num_top)


def choose_of(
    logits: jax.Array, state: DecodeState, stop_ids: jax.Array, *, vocab_size: int, num_top: int
) -> tuple[DecodeState, tuple[jax.Array, ...]]:
    """As `choose`, from logits [B, V]."""
    # rows of the table beyond the tokenizer are padding: they have logits but no text
    logits = jnp.where(jnp.arange(logits.shape[-1])[None] < vocab_size, logits, -jnp.inf)
    rows = state.rows
    logprobs = jax.nn.log_softmax(logits)

    def likeliest() -> jax.Array:
        return jnp.argmax(logits, -1).astype(jnp.int32)

    def top() -> tuple[jax.Array, jax.Array]:
        values, tokens = lax.top_k(logprobs, min(num_top, vocab_size))
        return values, tokens.astype(jnp.int32)

    # decided while running, so that one program serves greedy and sampled rows, with and without reports
    if rows is None:
        token, (top_logprobs, top_tokens) = likeliest(), top()
    else:
        token = lax.cond(jnp.all(rows.plain), likeliest, lambda: sample(logits, rows, state.steps, stop_ids))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(top))
        top_logprobs, top_tokens = lax.cond(jnp.any(rows.report), top, lambda: nothing)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    steps = state.steps + 1
    stopped = jnp.any(token[:, None] == jnp.atleast_2d(stop_ids), axis=-1) | (steps >= state.limits)
    state = state.replace(
        tokens=token,
        steps=jnp.where(state.done, state.steps, steps),
        done=state.done | stopped,
        rows=None if state.rows is None else state.rows.record(token),
    )
    return state, (token, chosen, top_tokens, top_logprobs)


STATIC = ("config", "vocab_size", "num_top")


def new_cache(config: ModelConfig, params: Params, prompt_lengths: jax.Array, capacity: int) -> ContiguousCache:
    """An empty cache for these parameters and prompts of `prompt_lengths` [B]."""
    return empty_cache(
        config,
        prompt_lengths.shape[0],
        capacity,
        params["embed"]["embedding"].dtype,
        stacked=not isinstance(params["layers"], Unstacked),
        prompt_lengths=prompt_lengths,
    )


def read_in_pieces(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: ContiguousCache,
    visit: Callable[[Carry, jax.Array, jax.Array], Carry],
    carry: Carry,
    *,
    piece: int,
    only: jax.Array | None = None,
    sparse: bool = False,
) -> tuple[ContiguousCache, Carry]:
    """Reads prompts [B, T] of `cache.prompt_lengths` into an empty cache, `piece` tokens at a time.

    After each piece carry = visit(carry, hidden [B, piece, D], index of the piece's first token); with `only` [B],
    hidden is [B, 1, D]: of that token if it is in the piece, otherwise of one that means nothing. sparse: as `forward`.
    """
    tokens = jnp.pad(tokens, [(0, 0), (0, -tokens.shape[1] % piece)])

    def read(i: jax.Array, state: tuple[ContiguousCache, Carry]) -> tuple[ContiguousCache, Carry]:
        cache, carry = state
        weights, start = kept_in_loop((params, i * piece))
        out = forward(
            config,
            weights,
            Inputs.inference(lax.dynamic_slice_in_dim(tokens, start, piece, axis=1), start=start),
            cache=cache,
            only=None if only is None else jnp.clip(only - start, 0, piece - 1),
            sparse=sparse,
        )
        return out.cache, visit(carry, out.hidden, start)

    count = (jnp.max(cache.prompt_lengths) + piece - 1) // piece
    cache, carry = lax.fori_loop(0, count, read, (cache, carry))
    return cache.replace(lengths=cache.prompt_lengths), carry


def _read(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    capacity: int,
    piece: int,
) -> tuple[Cache, jax.Array]:
    """The cache of prompts [B, T], and the hidden state [B, D] of the last token of each."""
    cache = new_cache(config, params, lengths, capacity)
    if tokens.shape[1] <= piece:
        out = forward(config, params, Inputs.inference(tokens, start=0), cache=cache, only=lengths - 1)
        return out.cache.replace(lengths=lengths), out.hidden[:, 0]

    def last(found: jax.Array, hidden: jax.Array, start: jax.Array) -> jax.Array:
        ends_here = (lengths > start) & (lengths <= start + piece)
        return jnp.where(ends_here[:, None], hidden[:, 0], found)

    hidden = jnp.zeros((tokens.shape[0], config.hidden_size), params["embed"]["embedding"].dtype)
    sparse = config.sparse_prefill is not None and tokens.shape[1] > config.sparse_prefill.threshold
    return read_in_pieces(config, params, tokens, cache, last, hidden, piece=piece, only=lengths - 1, sparse=sparse)


@functools.partial(jax.jit, static_argnames=(*STATIC, "capacity", "piece"))
def prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    rows: SamplingRows | None,
    stop_ids: jax.Array,
    *,
    config: ModelConfig,
    vocab_size: int,
    num_top: int,
    capacity: int,
    piece: int = PIECE,
) -> tuple[DecodeState, Produced]:
    """Reads prompts, right-padded to [B, T], of true `lengths` [B], and chooses the first token of each answer.

    The cache gets `capacity` slots per row. With T above `piece` they are read that many tokens at a time, with the
    same result.
    """
    cache, hidden = _read(config, params, tokens, lengths, capacity, piece)
    zeros = jnp.zeros_like(lengths)
    state = DecodeState(cache, zeros, zeros, limits, limits <= 0, rows)
    state, produced = choose(
        hidden, state, stop_ids, config=config, params=params, vocab_size=vocab_size, num_top=num_top
    )
    return state, Produced(*(x[:, None] for x in produced))


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames="state")
def decode(
    params: Params,
    state: DecodeState,
    num_steps: jax.Array,
    stop_ids: jax.Array,
    *,
    config: ModelConfig,
    vocab_size: int,
    num_top: int,
) -> tuple[DecodeState, Produced, jax.Array]:
    """Up to `num_steps` <= MAX_STEPS more tokens for every row, stopping early once all are done.

    Returns the state, the tokens (rows that were done already repeat themselves) and how many steps were taken.
    """
    batch = state.tokens.shape[0]
    buffers = Produced(
        tokens=jnp.zeros((batch, MAX_STEPS), jnp.int32),
        logprobs=jnp.zeros((batch, MAX_STEPS)),
        top_tokens=jnp.zeros((batch, MAX_STEPS, min(num_top, vocab_size)), jnp.int32),
        top_logprobs=jnp.zeros((batch, MAX_STEPS, min(num_top, vocab_size))),
    )

    def unfinished(carry: tuple[jax.Array, DecodeState, Produced]) -> jax.Array:
        step, state, _ = carry
        return (step < num_steps) & ~jnp.all(state.done)

    def one(carry: tuple[jax.Array, DecodeState, Produced]) -> tuple[jax.Array, DecodeState, Produced]:
        step, state, buffers = carry
        embed, tokens = kept_in_loop((params["embed"], state.tokens))
        weights = params | {"embed": embed}
        out = forward(config, weights, Inputs.inference(tokens[:, None]), cache=state.cache)
        state = state.replace(cache=out.cache.replace(lengths=out.cache.lengths + 1))
        state, produced = choose(
            out.hidden[:, 0], state, stop_ids, config=config, params=weights, vocab_size=vocab_size, num_top=num_top
        )
        buffers = jax.tree.map(lambda buffer, new: buffer.at[:, step].set(new), buffers, Produced(*produced))
        return step + 1, state, buffers

    steps, state, buffers = lax.while_loop(unfinished, one, (jnp.int32(0), state, buffers))
    return state, buffers, steps


@functools.partial(jax.jit, static_argnames="rows")
def widen(state: DecodeState, rows: int) -> DecodeState:
    """The state with finished filler rows appended, where a backend decodes more rows faster than fewer.

    They repeat the last row: rows of zeros would divide by a repetition penalty of 0.
    """
    filler = rows - state.tokens.shape[0]
    state = jax.tree.map(lambda x: jnp.pad(x, [(0, filler)] + [(0, 0)] * (x.ndim - 1), mode="edge"), state)
    return state.replace(done=state.done.at[state.done.shape[0] - filler :].set(True))


def bucket(size: int, smallest: int = 1) -> int:
    """The power of two, at least `smallest`, that holds `size`."""
    return max(smallest, 1 << (size - 1).bit_length())


def half_bucket(size: int, smallest: int) -> int:
    """As `bucket`, with the steps halfway between two powers as well: where computing on padding costs more."""
    whole = bucket(size, smallest)
    return whole * 3 // 4 if size <= whole * 3 // 4 and whole > smallest else whole


def pad_prompts(prompts: list[list[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids right-padded to [rows, length], and true lengths [rows]; rows beyond the prompts hold one token."""
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        lengths[i] = len(prompt)
    return tokens, lengths
