"""A model a layer at a time, in float32: what it computes, in the memory of one layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.model import Inputs, Params, embed, forward, unembed
from qwen_jax.unstacked import Unstacked
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.load import load_layer, load_outside


def one_layer(config: ModelConfig, index: int) -> ModelConfig:
    """A model of this one layer."""
    windows = (config.layer_windows()[index],)
    return dataclasses.replace(config, num_layers=1, windows=windows, sparse_prefill=None)


@functools.partial(jax.jit, static_argnames="config")
def embed_tokens(outside: Params, tokens: jax.Array, *, config: ModelConfig) -> jax.Array:
    """float32 [B, T, D] of tokens [B, T], given what is in no layer."""
    return embed(config, outside, Inputs.inference(tokens), jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def run_layer(layer: Params, final_norm: Any, x: jax.Array, *, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """x [B, T, D] after the layer, and what the final norm makes of that; config: `one_layer`'s."""
    params = {"layers": Unstacked([layer]), "final_norm": final_norm}
    out = forward(config, params, Inputs.inference(x), return_layers=True, dtype=jnp.float32)
    assert out.layers is not None
    return out.layers[1], out.hidden


class Difference(NamedTuple):
    """How far two models' logits after the same tokens are apart."""

    largest: float
    mean: float
    largest_logit: float  # the magnitude of theirs
    agreement: float  # the share of tokens after which both find the same one likeliest
    tokens: int


def logit_difference(ours: Checkpoint, theirs: Checkpoint, tokens: np.ndarray) -> Difference:
    """Of two checkpoints of one architecture, widened to float32, over int32 tokens [B, T]."""
    found, wanted = (np.asarray(_logits(each, tokens)) for each in (ours, theirs))
    apart = np.abs(found - wanted)
    same = found.argmax(-1) == wanted.argmax(-1)
    largest, mean, largest_logit, agreement = map(float, (apart.max(), apart.mean(), np.abs(wanted).max(), same.mean()))
    return Difference(largest, mean, largest_logit, agreement, tokens.size)


def _logits(checkpoint: Checkpoint, tokens: np.ndarray) -> jax.Array:
    """float32 [B, T, V]."""
    outside = load_outside(checkpoint)
    x = hidden = embed_tokens(outside, jnp.asarray(tokens), config=checkpoint.config)
    for index in range(checkpoint.config.num_layers):
        layer = load_layer(checkpoint, index, np.float32)
        x, hidden = run_layer(layer, outside["final_norm"], x, config=one_layer(checkpoint.config, index))
    return unembed(checkpoint.config, outside, hidden)
