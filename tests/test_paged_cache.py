"""A paged cache against the contiguous one: the same answers, wherever its pages lie and whatever else they hold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.backend import Backend, current_backend
from qwen_jax.cache import Cache, empty_cache
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels import native
from qwen_jax.kernels.choice import PAGED_ROWS, choose
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.model import Inputs, forward, init, unstack
from qwen_jax.paged_cache import PagedCache, paged_cache
from tests.infer import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=64)
CONFIGS = {
    "plain": CONFIG,
    "window": dataclasses.replace(CONFIG, windows=(40, None)),
    "dual_chunk": dataclasses.replace(CONFIG, dual_chunk=DualChunk(40, 8, 64)),  # chunks of 32
}
PAGE, PIECE, LENGTHS = 32, 50, np.array([100, 71], np.int32)  # pieces that neither begin nor end on pages
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 100 + 4)).astype(np.int32)


def empty_pages(config: ModelConfig, dtype: str) -> PagedCache:
    """Pages out of order, and poison in all of them: nothing is read that was not written."""
    tables = jnp.asarray([[5, 3, 8, 1, -7], [2, 9, 6, 4, 999]], jnp.int32)
    cache = paged_cache(config, 10, PAGE, dtype, tables=tables, prompt_lengths=jnp.asarray(LENGTHS))
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, cache)


def read(config: ModelConfig, cache: Cache) -> np.ndarray:
    """Hidden states [B, 4, D] of four tokens, one at a time, after prompts that were read in pieces."""
    params = unstack(init(config, jax.random.key(0)))

    @jax.jit
    def step(cache, tokens, start):
        out = forward(config, params, Inputs.inference(tokens, start=start), cache=cache)
        return out.cache, out.hidden

    for begin in range(0, 100, PIECE):
        cache, _ = step(cache, TOKENS[:, begin : begin + PIECE], jnp.int32(begin))
    hidden = []
    for i in range(4):
        cache, last = step(cache, TOKENS[:, 100 + i : 101 + i], LENGTHS + i)
        hidden.append(last)
    return np.concatenate(hidden, axis=1)


@functools.cache
def expected(name: str) -> np.ndarray:
    cache = empty_cache(CONFIGS[name], 2, 128, jnp.float32, stacked=False, prompt_lengths=jnp.asarray(LENGTHS))
    return read(CONFIGS[name], cache)


BACKENDS = {
    "cpu": current_backend(),
    "native": dataclasses.replace(current_backend(), native=True),
    "tpu": Backend("tpu", interpret=True),
    "gpu": Backend("gpu", interpret=True),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("platform", BACKENDS)
def test_pages_are_the_whole(name: str, platform: str) -> None:
    if platform == "native" and (reason := native.why_not()):
        pytest.skip(reason)
    with BACKENDS[platform].entered():
        found = read(CONFIGS[name], empty_pages(CONFIGS[name], "float32"))
    np.testing.assert_allclose(found, expected(name), atol=2e-5)


@pytest.mark.parametrize("platform", BACKENDS)
def test_int8_is_near(platform: str) -> None:
    with BACKENDS[platform].entered():
        found = read(CONFIGS["plain"], empty_pages(CONFIGS["plain"], "int8"))
    assert 1e-4 < np.linalg.norm(found - expected("plain")) / np.linalg.norm(expected("plain")) < 0.1


def test_int8_is_within_half_a_step() -> None:
    """Of each key and value the largest is 127 steps."""
    rng = np.random.default_rng(2)
    k, v = (jnp.asarray(rng.normal(size=(2, 1, 70, 64)), jnp.float32) for _ in "kv")
    cache = empty_pages(CONFIG, "int8")
    pages = cache.layers[0].written(cache.tables, k, v, jnp.asarray([5, 33]))
    for found, new in zip(pages.gathered(cache.tables, 0, jnp.asarray([75, 103]), jnp.float32), (k, v), strict=True):
        for row, start in enumerate((5, 33)):
            wrong = np.abs(found[row, :, start : start + 70] - new[row])
            assert (wrong <= np.abs(new[row]).max(-1, keepdims=True) / 127 * 0.5001).all()


@pytest.mark.parametrize(
    ("kernels", "queries", "row"),
    [
        ("cpu", 1, "blocks of pages"),
        ("cpu", 64, "blocks of pages"),
        ("tpu", 1, "TPU paged decode kernel"),
        ("tpu", 64, "pages gathered"),
        ("gpu", 1, "GPU paged decode kernel"),
        ("gpu", 64, "pages gathered"),
        ("native", 1, "native paged decode kernel"),
        ("native", 64, "blocks of pages"),
    ],
)
def test_row(kernels, queries: int, row: str) -> None:
    backend = BACKENDS["native"] if kernels == "native" else Backend(kernels)
    q, pages = jnp.zeros((2, queries, 2, 64)), jnp.zeros((1, 10, PAGE, 64))
    assert choose(q, pages, AttentionSpec(jnp.zeros(2, int)), backend, rows=PAGED_ROWS).name == row


def test_scanned_layers_are_refused() -> None:
    inputs = Inputs.inference(jnp.zeros((2, 1), jnp.int32))
    with pytest.raises(InputError, match="unstack the parameters"):
        forward(CONFIG, init(CONFIG, jax.random.key(0)), inputs, cache=empty_pages(CONFIG, "float32"))
