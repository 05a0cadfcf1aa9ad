"""An int8 cache: it holds the nearest multiples of a scale for each key and value, and these are attended to."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.decode import new_cache
from infer.qwen import load
from qwen_jax.backend import Backend, current_backend
from qwen_jax.cache import ContiguousCache, empty_cache
from qwen_jax.config import DualChunk
from qwen_jax.errors import InputError
from qwen_jax.kernels.choice import SCALED_ROWS, choose
from qwen_jax.kernels.scaled import Scaled
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.model import Inputs, forward, init, unstack
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.infer import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=64)
CONFIGS = {
    "plain": CONFIG,
    "window": dataclasses.replace(CONFIG, windows=(40, None)),
    "dual_chunk": dataclasses.replace(CONFIG, dual_chunk=DualChunk(160, 32, 256)),  # chunks of 128
}
BACKENDS = {
    "cpu": dataclasses.replace(current_backend(), cache_dtype=jnp.dtype(jnp.int8)),
    "tpu": Backend("tpu", interpret=True, cache_dtype=jnp.dtype(jnp.int8)),
    "gpu": Backend("gpu", interpret=True, cache_dtype=jnp.dtype(jnp.int8)),
}
LENGTHS = np.array([180, 101], np.int32)


def cache_of(batch: int, stacked: bool = False) -> ContiguousCache:
    return empty_cache(CONFIG, batch, 256, jnp.float32, stacked=stacked, prompt_lengths=jnp.asarray(LENGTHS[:batch]))


def rounded(x: np.ndarray) -> np.ndarray:
    """The formula, in float64: of each vector the largest magnitude is 127 steps, and every number the nearest step."""
    step = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float64)
    return np.round(x / step) * step


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("start", [None, (7, 60)], ids=["from the beginning", "in the middle"])
def test_what_is_held(start: tuple[int, int] | None, stacked: bool) -> None:
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(2, 2, 70, 64)).astype(np.float32) for _ in "kv")
    k[0, 1, 3] = 0  # a vector of zeros stays one
    with BACKENDS["cpu"].entered():
        cache = cache_of(2, stacked).write(1, jnp.asarray(k), jnp.asarray(v), jnp.asarray(start) if start else 0)
    values = jax.tree.leaves((cache.k, cache.v))
    assert {str(x.dtype) for x in values} == {"int8", "float32"}
    for held, new in zip(cache.read(1, jnp.float32), (k, v), strict=True):
        for row, begin in enumerate(start or (0, 0)):
            expected = rounded(np.where(new == 0, 1e-30, new))[row]
            np.testing.assert_allclose(held[row, :, begin : begin + 70], expected, rtol=1e-6, atol=1e-25)
            assert np.count_nonzero(held[row, :, begin + 70 :]) == 0


@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("platform", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_the_formula_over_what_is_held(name: str, platform: str, queries: int) -> None:
    """softmax(q k^T / sqrt(h)) v in float64 over the rounded keys and values, each query up to its own place."""
    chunk, window = (128, None) if name == "dual_chunk" else (None, 40 if name == "window" else None)
    rng = np.random.default_rng(1)
    k, v = (rng.normal(size=(2, 2, 256, 64)).astype(np.float32) for _ in "kv")
    q = rng.normal(size=(*(3,) * bool(chunk), 2, queries, 4, 64)).astype(np.float32)
    start = np.array([180, 101], np.int32)
    with BACKENDS[platform].entered():
        cache = cache_of(2).write(0, jnp.asarray(k), jnp.asarray(v), 0)
        spec = AttentionSpec(jnp.asarray(start), window=window, chunk_length=chunk)
        found = jax.jit(lambda cache, q: cache.attend(0, q, spec))(cache, q)
    k, v = (np.repeat(rounded(x), 2, axis=1) for x in (k, v))  # [B, H, S, h]
    place, key = start[:, None] + np.arange(queries)[None], np.arange(256)  # [B, T], [S]
    scores = np.einsum("nbthd,bhsd->nbhts", q if chunk else q[None], k) / 8
    if chunk:
        back = np.clip(place[..., None] // chunk - key // chunk, 0, 2)[:, None]  # [B, 1, T, S]
        scores = np.take_along_axis(scores, np.broadcast_to(back, scores.shape[1:])[None], axis=0)
    seen = key <= place[..., None]
    if window:
        seen &= key > place[..., None] - window
    weights = np.exp(np.where(seen[:, None], scores[0] - scores[0].max(-1, keepdims=True), -np.inf))
    expected = np.einsum("bhts,bhsd->bthd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("kernels", "queries", "row"),
    [
        *[("cpu", 1, "blocks of keys"), ("cpu", 64, "blocks of keys")],
        *[("tpu", 1, "TPU decode kernel"), ("tpu", 64, "widened")],
        *[("gpu", 1, "GPU decode kernel"), ("gpu", 64, "widened")],
    ],
)
def test_row(kernels, queries: int, row: str) -> None:
    q, k = jnp.zeros((2, queries, 4, 64)), Scaled.of(jnp.zeros((2, 2, 256, 64)))
    assert choose(q, k, AttentionSpec(jnp.zeros(2, int)), Backend(kernels), rows=SCALED_ROWS).name == row


def read(stacked: bool = False, int8: bool = True) -> np.ndarray:
    """Hidden states of prompts that are read in pieces, the last one's, and of tokens one at a time after them."""
    params = init(CONFIG, jax.random.key(0))
    params = params if stacked else unstack(params)
    tokens = np.random.default_rng(2).integers(0, 256, (2, 184)).astype(np.int32)

    @jax.jit
    def step(params, cache, tokens, start):
        out = forward(CONFIG, params, Inputs.inference(tokens, start=start), cache=cache)
        return out.cache, out.hidden

    with (BACKENDS["cpu"] if int8 else current_backend()).entered():
        cache, hidden = jax.jit(lambda: cache_of(2, stacked))(), []
        for begin in range(0, 180, 60):
            cache, last = step(params, cache, tokens[:, begin : begin + 60], jnp.int32(begin))
        for i in range(4):
            hidden.append(last)
            cache, last = step(params, cache, tokens[:, 180 + i : 181 + i], LENGTHS + i)
    return np.concatenate([*hidden, last], axis=1)


@functools.cache
def expected(int8: bool) -> np.ndarray:
    return read(int8=int8)


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_int8_is_near() -> None:
    assert 1e-4 < apart(expected(int8=True), expected(int8=False)) < 0.1


@pytest.mark.parametrize(
    ("mesh", "stacked"), [("", True), ("tensor=4", False), ("data=2,tensor=2", False), ("context=2,tensor=2", True)]
)
def test_any_mesh_gives_the_same(mesh: str, stacked: bool) -> None:
    """As one device with layers apart, but that sums in another order may round a key to the next step."""
    if not mesh:
        found = read(stacked)
    else:
        with jax.set_mesh(make_mesh(MeshConfig.parse(mesh), jax.devices()[:4], model=CONFIG)):
            found = read(stacked)
    assert apart(found, expected(int8=True)) < 2e-3


def test_a_model_is_asked_for_one(tmp_path: Path) -> None:
    folder = tiny.save_folder(tmp_path / "model", CONFIG, init(CONFIG, jax.random.key(0)))
    qwen = load(folder, dtype="float32", cache_dtype="int8", progress=False)
    with qwen.entered():
        cache = new_cache(CONFIG, qwen.params, jnp.asarray(LENGTHS), 256)
    assert isinstance(cache.k[0], Scaled) and cache.k[0].shape == (2, 2, 256, 64)
    with pytest.raises(InputError, match="cache_dtype 'int4' is not possible"):
        load(folder, cache_dtype="int4", progress=False)
