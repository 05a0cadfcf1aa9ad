"""The compiled programs of an engine besides `infer.decode.decode`: a piece of one prompt, read into its pages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from infer.decode import STATIC, DecodeState, Produced, choose
from infer.sampling import SamplingRows
from qwen_jax.config import ModelConfig
from qwen_jax.model import Inputs, Params, forward
from qwen_jax.paged_cache import PagedCache


@functools.partial(jax.jit, static_argnames=(*STATIC, "last"), donate_argnames="cache")
def read(
    params: Params,
    cache: PagedCache,
    tokens: jax.Array,
    count: jax.Array,
    rows: SamplingRows | None,
    stop_ids: jax.Array,
    *,
    config: ModelConfig,
    vocab_size: int,
    num_top: int,
    last: bool,
) -> tuple[PagedCache, Produced | None]:
    """Reads `count` of tokens [1, C] after those that the cache's one row holds; with `last`, chooses the next.

    What stands beyond `count` is written too, behind the row's end, where the next tokens overwrite it.
    """
    only = jnp.reshape(count - 1, (1,))
    out = forward(config, params, Inputs.inference(tokens), cache=cache, only=only)
    assert isinstance(out.cache, PagedCache)
    if not last:
        return out.cache, None
    zeros = jnp.zeros(1, jnp.int32)
    state = DecodeState(out.cache, zeros, zeros, zeros + 1, zeros > 0, rows)
    _, produced = choose(
        out.hidden[:, 0], state, stop_ids, config=config, params=params, vocab_size=vocab_size, num_top=num_top
    )
    return out.cache, Produced(*(x[:, None] for x in produced))
