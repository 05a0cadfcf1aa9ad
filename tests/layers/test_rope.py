"""Rotary tables against transformers' own functions, released check values and the formulas."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import (
    DualChunk,
    DynamicNtkScaling,
    LinearScaling,
    ModelConfig,
    NtkScaling,
    RopeScaling,
    YarnScaling,
)
from qwen_jax.layers.rope import (
    dual_chunk_positions,
    dual_chunk_scale,
    inverse_frequencies,
    logn_scale,
    ntk_alpha,
    rotary_tables,
    yarn_attention_factor,
)
from qwen_jax.model import Inputs, forward, init, unstack
from qwen_jax.presets import load_preset
from tests.infer import tiny

POSITIONS = jnp.asarray([[0, 1, 2, 511, 512, 8191, 32767, 131071, 1009999]])


def scaled(scaling: RopeScaling | None, head_dim: int = 128, theta: float = 1e6, **changes: Any) -> ModelConfig:
    return dataclasses.replace(
        tiny.CONFIG, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling, max_position_embeddings=32768, **changes
    )


def transformers_tables(config: ModelConfig, kind: str, **parameters: Any) -> tuple[np.ndarray, float]:
    """inv_freq and attention factor that transformers computes; `seq_len` goes to its function."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    seq_len = parameters.pop("seq_len", None)
    theirs = transformers.Qwen2Config(
        hidden_size=config.head_dim * config.num_heads,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": kind, "rope_theta": config.rope_theta} | parameters,
    )
    if kind == "default":
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

        module = Qwen2RotaryEmbedding(theirs)
        frequencies, factor = module.inv_freq, module.attention_scaling
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=seq_len)
    return frequencies.numpy(), factor


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6, 5e6, 1e7])
@pytest.mark.parametrize(
    ("scaling", "kind", "parameters"),
    [
        (None, "default", {}),
        (LinearScaling(4.0), "linear", {"factor": 4.0}),
        (NtkScaling(7.0), "dynamic", {"factor": 1.0, "seq_len": 7 * 32768}),  # there, the length's share of the trained
        (YarnScaling(4.0, 32768), "yarn", YARN),
        (YarnScaling(2.5, 8192), "yarn", {"factor": 2.5, "original_max_position_embeddings": 8192}),
        (YarnScaling(4.0, 32768, beta_fast=16.0, beta_slow=2.0), "yarn", YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
        (YarnScaling(4.0, 32768, attention_factor=1.5), "yarn", YARN | {"attention_factor": 1.5}),
        (
            YarnScaling(4.0, 32768, mscale=0.7, mscale_all_dim=1.3),
            "yarn",
            YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        ),
    ],
)
def test_frequencies_are_transformers(head_dim, theta, scaling, kind, parameters):
    config = scaled(scaling, head_dim, theta)
    expected, factor = transformers_tables(config, kind, **parameters)
    found, scale = inverse_frequencies(config)
    np.testing.assert_allclose(found[0], expected, rtol=3e-7)
    assert scale == pytest.approx(factor, rel=1e-12)


def test_tables_are_of_angles_in_float32():
    """Positions up to a million: an angle of 1e6 is known to 0.06 in float32, so tables follow float32 arithmetic."""
    config = scaled(None)
    cos, sin = rotary_tables(config, POSITIONS).key
    angles = np.asarray(POSITIONS, np.float32)[0, :, None] * np.asarray(inverse_frequencies(config)[0])
    assert angles.dtype == np.float32
    np.testing.assert_allclose(cos[0], np.cos(angles.astype(np.float64)), atol=2e-7)
    np.testing.assert_allclose(sin[0], np.sin(angles.astype(np.float64)), atol=2e-7)


@pytest.mark.parametrize(("head_dim", "low", "high"), [(128, 23, 40), (64, 11, 20)])
def test_yarn_bounds(head_dim, low, high):
    """Unscaled up to pair `low`, divided by the factor from pair `high` on, and in between neither."""
    plain = np.asarray(inverse_frequencies(scaled(None, head_dim))[0][0])
    ratio = plain / np.asarray(inverse_frequencies(scaled(YarnScaling(4.0, 32768), head_dim))[0][0])
    np.testing.assert_allclose(ratio[: low + 1], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[high:], 4, rtol=1e-6)
    assert ((ratio[low + 1 : high] > 1.001) & (ratio[low + 1 : high] < 3.999)).all()
    assert yarn_attention_factor(YarnScaling(4.0, 32768)) == pytest.approx(1.1386294)


def test_yarn_scales_queries_and_keys():
    rotary = rotary_tables(scaled(YarnScaling(4.0, 32768)), POSITIONS)
    for cos, sin in (*rotary.query, rotary.key):
        np.testing.assert_allclose(cos**2 + sin**2, 1.1386294**2, rtol=1e-6)


# --- Qwen1 ------------------------------------------------------------------------------------------------------------


def test_dynamic_ntk_of_each_sequence():
    lengths = jnp.asarray([1, 8192, 8193, 16384, 16385, 32768])
    assert ntk_alpha(lengths, 8192).tolist() == [1, 1, 3, 3, 7, 7]
    bases = {1: 10000.0, 3: 30527.7367, 7: 72195.8601}
    found, _ = inverse_frequencies(scaled(DynamicNtkScaling(8192), theta=1e4), lengths)
    for row, alpha in zip(np.asarray(found), [1, 1, 3, 3, 7, 7], strict=True):
        np.testing.assert_allclose(row, bases[alpha] ** -(np.arange(64) / 64), rtol=2e-6)
    expected, _ = transformers_tables(scaled(None, theta=1e4), "dynamic", factor=1.0, seq_len=7 * 32768)
    np.testing.assert_allclose(found[5], expected, rtol=1e-6)


def test_dynamic_ntk_and_logn_are_off_in_training():
    config = scaled(DynamicNtkScaling(32), logn_trained_length=32)
    (query,), key = (rotary := rotary_tables(config, POSITIONS)).query, rotary.key
    plain = rotary_tables(scaled(None), POSITIONS).key
    for table, with_it, expected in zip(query, key, plain, strict=True):
        np.testing.assert_array_equal(table, expected)
        np.testing.assert_array_equal(with_it, expected)


def test_logn():
    """s(i) of the 1-based position i, on queries only."""
    for trained, ordinal, expected in ((8192, 16384, 1.076923), (8192, 32767, 1.153843), (2048, 8192, 1.181818)):
        scale = logn_scale(scaled(None, logn_trained_length=trained), jnp.asarray([[ordinal - 1]]), jnp.asarray([1]))
        assert scale is not None and float(scale[0, 0]) == pytest.approx(expected, abs=1e-6)
    config = scaled(None, logn_trained_length=512)
    rotary = rotary_tables(config, POSITIONS, jnp.asarray([10**6]))
    norms = [np.sqrt(cos[0] ** 2 + sin[0] ** 2)[:, 0] for cos, sin in (*rotary.query, rotary.key)]
    expected = [max(1.0, math.log(p + 1) / math.log(512)) for p in POSITIONS[0].tolist()]
    np.testing.assert_allclose(norms[0], expected, rtol=1e-6)
    np.testing.assert_allclose(norms[1], 1, rtol=1e-6)


# --- Dual Chunk Attention ---------------------------------------------------------------------------------------------


def test_dual_chunk_positions_of_the_1m_models():
    chunk = load_preset("qwen2.5-7b-instruct-1m").dual_chunk
    assert chunk
    length = 253952
    positions = jnp.asarray([[0, length - 1, length, length + 8191, length + 8192, 2 * length - 1, 3 * length + 5]])
    intra, successive, inter, key = (x[0].tolist() for x in dual_chunk_positions(chunk, positions))
    assert intra == key == [0, length - 1, 0, 8191, 8192, length - 1, 5]
    # clamped at C = 262144, not at C - 1 as the paper has it
    assert successive == [length, 262144, length, length + 8191, 262144, 262144, length + 5]
    assert inter == [262144] * 7


def test_inter_position_of_chunks_shorter_than_the_window():
    """With s <= w the last entry of the successive table, min(2 s - 1, C), lies below C."""
    inter = dual_chunk_positions(DualChunk(100, 60, 0), jnp.arange(200)[None])[2]
    assert set(inter[0].tolist()) == {79}


def test_length_scaling():
    chunk = DualChunk(262144, 8192, 262144)
    at = jnp.asarray([[0, 262143]])
    for length, expected in ((1000, 1.0), (262144, 1.0), (524288, 1.069315), (1010000, 1.134881)):
        scale = dual_chunk_scale(chunk, at, jnp.asarray([length]))
        np.testing.assert_allclose(scale, [[expected] * 2], atol=1e-6)  # all of a prompt has the prompt's
    # after the prompt, the length so far
    scale = dual_chunk_scale(chunk, jnp.asarray([[524287]]), jnp.asarray([300000]))
    np.testing.assert_allclose(scale, 1.069315, atol=1e-6)
    assert dual_chunk_scale(chunk, at, None) is None
    assert dual_chunk_scale(DualChunk(262144, 8192, 0), at, jnp.asarray([10**6])) is None


def test_dual_chunk_scales_queries_and_keys():
    config = scaled(None, dual_chunk=DualChunk(1024, 256, 4096))
    rotary = rotary_tables(config, POSITIONS, jnp.asarray([1010000]), dual_chunk=True)
    assert len(rotary.query) == 3
    for cos, sin in (*rotary.query, rotary.key):
        np.testing.assert_allclose(np.sqrt(cos**2 + sin**2), 1 + 0.1 * math.log(1010000 / 4096), rtol=1e-6)


def test_sines_are_computed_once_for_all_layers() -> None:
    params = unstack(init(tiny.CONFIG, jax.random.key(0)))
    assert len(params["layers"]) > 1
    tokens = jnp.zeros((1, 64), jnp.int32)
    program = jax.jit(lambda params, tokens: forward(tiny.CONFIG, params, Inputs.training(tokens)).hidden)
    text = program.lower(params, tokens).compile().as_text()
    assert text.count(" sine(") == text.count(" cosine(") == 1
