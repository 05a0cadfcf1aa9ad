"""What `forward` is given: embeddings in place of tokens, training or inference, and what a cache cannot hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.cache import ContiguousCache, empty_cache
from qwen_jax.config import DualChunk
from qwen_jax.errors import InputError
from qwen_jax.model import Inputs, Params, embed, forward, init
from tests.infer import tiny

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 40)), jnp.int32)


@pytest.fixture(scope="module")
def params() -> Params:
    return init(tiny.QWEN1_CONFIG, jax.random.key(0))


def hidden(params: Params, inputs: Inputs) -> jax.Array:
    return jax.jit(forward, static_argnums=0)(tiny.QWEN1_CONFIG, params, inputs).hidden


def test_embeddings_in_place_of_tokens(params: Params) -> None:
    tokens = Inputs.training(TOKENS)
    embedded = Inputs.training(embed(tiny.QWEN1_CONFIG, params, tokens))
    np.testing.assert_array_equal(hidden(params, embedded), hidden(params, tokens))


def test_training_and_inference_are_two_models_beyond_the_trained_length(params: Params) -> None:
    """Qwen1 trained on 32 tokens: a prompt of 40 is turned with another base, one of 30 is not."""
    training = hidden(params, Inputs.training(TOKENS))
    inference = hidden(params, Inputs.inference(TOKENS, lengths=jnp.asarray([40, 30])))
    assert np.abs(inference - training)[0].max() > 0.01
    np.testing.assert_allclose(inference[1, :30], training[1, :30], atol=1e-5)
    np.testing.assert_array_equal(hidden(params, Inputs.inference(TOKENS))[0], inference[0])


def test_tokens_alone_where_training_and_inference_are_one_model(params: Params) -> None:
    with pytest.raises(InputError, match="Inputs.training"):
        forward(tiny.QWEN1_CONFIG, params, TOKENS)
    alike = init(tiny.CONFIG, jax.random.key(0))
    expected = forward(tiny.CONFIG, alike, Inputs.training(TOKENS)).hidden
    np.testing.assert_array_equal(forward(tiny.CONFIG, alike, TOKENS).hidden, expected)


def empty(config=tiny.CONFIG) -> ContiguousCache:
    return empty_cache(config, 2, 64, jnp.float32, stacked=True, prompt_lengths=jnp.asarray([40, 40]))


CHUNKED = dataclasses.replace(tiny.CONFIG, dual_chunk=DualChunk(40, 8, 64))


@pytest.mark.parametrize(
    ("inputs", "cache", "said"),
    [
        (Inputs.inference(TOKENS, segment_ids=jnp.ones_like(TOKENS)), True, "leave `segment_ids` out"),
        (Inputs.training(TOKENS), True, "use Inputs.inference"),
        (Inputs.inference(TOKENS, start=0), False, "leave `start` out"),
        (Inputs.inference(TOKENS, rotary_positions=TOKENS), True, "counts chunks by place"),
    ],
)
def test_what_does_not_fit_is_refused(params: Params, inputs: Inputs, cache: bool, said: str) -> None:
    with pytest.raises(InputError, match=said):
        forward(CHUNKED, params, inputs, cache=empty() if cache else None)
