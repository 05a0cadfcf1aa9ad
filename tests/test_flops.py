"""Model FLOPs by formula against what XLA counts in the program of a small model, and against 6 N."""

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.flops import attention_flops, matmul_params, model_flops
from qwen_jax.model import Inputs, abstract, forward, unembed
from qwen_jax.presets import load_preset

TINY = ModelConfig(
    model_type="qwen2",
    vocab_size=512,
    hidden_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)


def test_decode_is_what_xla_counts() -> None:
    """One token after 63 others, each product counted by XLA's own cost analysis of the unsharded CPU program."""
    from qwen_jax.cache import empty_cache

    def step(params, tokens, lengths):
        cache = empty_cache(TINY, 2, 64, jnp.float32, stacked=True, prompt_lengths=lengths)
        return unembed(TINY, params, forward(TINY, params, Inputs.inference(tokens), cache=cache).hidden)

    shapes = abstract(TINY), jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    analysis = jax.jit(step).lower(*shapes).compile().cost_analysis()
    assert analysis
    counted = analysis["flops"]  # elementwise work among it
    assert model_flops(TINY, "decode", 2, 64) == pytest.approx(counted, rel=0.1)


def test_training_is_six_n_per_token_for_short_sequences() -> None:
    config = load_preset("qwen2.5-7b")
    n = 7_615_616_512 - 152064 * 3584  # all parameters but the embedding's
    assert model_flops(config, "train", 1, 1) == pytest.approx(6 * n, rel=1e-4)


def test_frozen_weights_have_no_gradients() -> None:
    """Forward and to the inputs, 2 N each per token, and attention three times."""
    frozen, whole = (model_flops(TINY, "train", 3, 64, frozen=frozen) for frozen in (True, False))
    assert whole - frozen == 3 * 64 * 2 * matmul_params(TINY)


def test_causal_attention_is_half_of_the_square() -> None:
    config = load_preset("qwen2.5-7b")
    square = 4 * config.num_layers * config.num_heads * config.head_dim * 8192**2
    assert attention_flops(config, 8192) == pytest.approx(square / 2, rel=1e-3)


def test_attention_counts_visible_keys_one_by_one() -> None:
    config = load_preset("qwen2.5-0.5b")
    per_key = 4 * config.num_heads * config.head_dim
    assert attention_flops(config, 5, 3) == config.num_layers * per_key * (4 + 5 + 6 + 7 + 8)


def test_a_mixture_counts_active_parameters() -> None:
    config = load_preset("qwen2-57b-a14b")
    assert matmul_params(config) == config.num_active_params() - config.vocab_size * config.hidden_size


def test_prefill_leaves_out_the_last_layer_and_the_logits() -> None:
    """A model of one layer: of 63 of 64 tokens only keys and values are wanted."""
    kv = 2 * 64 * 2 * 2 * 16
    one_token = 2 * matmul_params(TINY) + 4 * 4 * 16 * 64
    norms_and_biases = 2 * 64 * (3 * 64 + 8 * 16)
    assert model_flops(TINY, "prefill", 1, 64) == pytest.approx(63 * kv + one_token, abs=norms_and_biases)
