"""Whole answers of small models by the rows that a TPU and a GPU take, their kernels interpreted, against plain jnp."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.decode import decode, prefill
from qwen_jax.backend import Backend
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.kernels import choice, native, plain
from qwen_jax.kernels.choice import choose, explain
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.model import Params, init, unstack
from tests.infer import tiny

BASE = dataclasses.replace(tiny.CONFIG, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=64)
CONFIGS = {
    "a window, and none": dataclasses.replace(BASE, windows=(40, None)),
    "chunks": dataclasses.replace(BASE, dual_chunk=DualChunk(160, 32, 64)),  # of 128
    "chunks of no whole blocks": dataclasses.replace(BASE, dual_chunk=DualChunk(150, 40, 64)),  # of 110
    "qwen1": dataclasses.replace(tiny.QWEN1_CONFIG, hidden_size=64, num_heads=2, num_kv_heads=2, head_dim=64),
}
LENGTHS = np.array([140, 70], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 140)).astype(np.int32)
STEPS = 4


def answer(config: ModelConfig, params: Params, piece: int, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their log-probabilities [B, 1 + steps], after prompts read `piece` tokens at a time."""
    never, fixed = np.array([-1], np.int32), {"config": config, "vocab_size": 263, "num_top": 0}
    limits = np.full(2, STEPS + 1, np.int32)
    state, first = prefill(params, TOKENS, LENGTHS, limits, None, never, capacity=160, piece=piece, **fixed)
    parts = [(first.tokens, first.logprobs)]
    if steps:
        _, rest, _ = decode(params, state, np.int32(steps), never, **fixed)
        parts.append((rest.tokens[:, :steps], rest.logprobs[:, :steps]))
    tokens, logprobs = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    return tokens, logprobs


@functools.cache
def expected(name: str) -> tuple[Params, np.ndarray, np.ndarray]:
    params = unstack(init(CONFIGS[name], jax.random.key(0)))
    return params, *answer(CONFIGS[name], params, 256)


# interpreted, they take half a minute each
SLOW = {(kernels, name) for kernels in ("tpu", "gpu") for name in ("qwen1", "chunks of no whole blocks")}
SLOW |= {("tpu", "chunks")}


@pytest.mark.parametrize(
    ("kernels", "name"),
    [
        pytest.param(kernels, name, marks=[pytest.mark.slow] if (kernels, name) in SLOW else [])
        for kernels in ("tpu", "gpu")
        for name in CONFIGS
    ],
)
def test_answers_are_those_of_plain_attention(kernels, name: str) -> None:
    """Prompts read whole and in pieces, and tokens decoded after them."""
    config, (params, tokens, logprobs) = CONFIGS[name], expected(name)
    with Backend(kernels, interpret=True).entered():
        whole, pieces = answer(config, params, 256, steps=0), answer(config, params, 64)
    np.testing.assert_array_equal(pieces[0], tokens)
    np.testing.assert_allclose(pieces[1], logprobs, atol=5e-5)
    np.testing.assert_array_equal(whole[0], tokens[:, :1])
    np.testing.assert_allclose(whole[1], logprobs[:, :1], atol=5e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_with_native_kernels(name: str) -> None:
    if reason := native.why_not():
        pytest.skip(reason)
    config, (params, tokens, logprobs) = CONFIGS[name], expected(name)
    with dataclasses.replace(Backend.of(None), native=True).entered():
        ours = answer(config, params, 64)
    np.testing.assert_array_equal(ours[0], tokens)
    np.testing.assert_allclose(ours[1], logprobs, atol=5e-5)


# --- the table --------------------------------------------------------------------------------------------------------

ROWS = jnp.zeros(2, jnp.int32)  # places that differ from row to row


@pytest.mark.parametrize(
    ("kernels", "shape", "keys", "spec", "row"),
    [
        ("tpu", (2, 1, 4, 64), 512, AttentionSpec(ROWS), "TPU decode kernel"),
        ("tpu", (3, 2, 1, 4, 64), 512, AttentionSpec(ROWS, chunk_length=256), "TPU decode kernel"),
        ("tpu", (3, 2, 1, 4, 64), 512, AttentionSpec(ROWS, chunk_length=110), "TPU flash kernel"),
        ("tpu", (2, 64, 4, 128), 64, AttentionSpec(query_segments=ROWS, key_segments=ROWS), "TPU flash kernel"),
        ("tpu", (2, 64, 4, 128), 64, AttentionSpec(window=jnp.int32(5)), "causal blocks"),
        ("tpu", (2, 1, 4, 64), 48, AttentionSpec(ROWS), "TPU flash kernel"),
        ("gpu", (2, 1, 4, 64), 48, AttentionSpec(ROWS), "GPU decode kernel"),
        ("gpu", (2, 64, 4, 128), 64, AttentionSpec(window=jnp.int32(5)), "GPU flash kernel"),
        ("gpu", (2, 64, 4, 96), 64, AttentionSpec(), "causal blocks"),
        ("gpu", (2, 64, 4, 64), 64, AttentionSpec(causal=False), "formula"),
        # the kernels count chunks from their first key
        (
            "tpu",
            (3, 2, 64, 4, 64),
            64,
            AttentionSpec(chunk_length=8, query_chunks=ROWS, key_chunks=ROWS),
            "causal blocks",
        ),
        ("tpu", (3, 2, 64, 4, 64), 64, AttentionSpec(64, 32, chunk_length=8), "formula"),
        ("cpu", (2, 1, 4, 64), 512, AttentionSpec(ROWS), "one query, keys left"),
        ("cpu", (2, 64, 4, 64), 1024, AttentionSpec(ROWS), "blocks of keys"),
        ("cpu", (2, 4096, 4, 64), 4096, AttentionSpec(), "causal blocks"),
        ("cpu", (2, 8192, 4, 64), 8192, AttentionSpec(), "blocks of queries"),
    ],
)
def test_row(kernels, shape: tuple[int, ...], keys: int, spec: AttentionSpec, row: str) -> None:
    q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (shape, (2, 2, keys, shape[-1])))
    assert choose(q, k, spec, Backend(kernels)).name == row


@pytest.mark.parametrize(
    ("shape", "spec", "row"),
    [
        ((2, 1, 4, 64), AttentionSpec(ROWS), "native decode kernel"),
        ((2, 1, 4, 64), AttentionSpec(ROWS, window=jnp.int32(5)), "native decode kernel"),
        ((2, 1, 4, 64), AttentionSpec(ROWS, key_start=3), "one query, keys left"),
        ((2, 1, 4, 64), AttentionSpec(ROWS, causal=False), "one query, keys left"),
        ((3, 2, 1, 4, 64), AttentionSpec(ROWS, chunk_length=256), "one query, keys left"),
        ((2, 1, 4, 24), AttentionSpec(ROWS), "one query, keys left"),
        ((2, 64, 4, 64), AttentionSpec(), "formula"),
    ],
)
def test_native_row(shape: tuple[int, ...], spec: AttentionSpec, row: str) -> None:
    q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (2, 2, 512, shape[-1])))
    backend = Backend("cpu", native=True)
    assert choose(q, k, spec, backend).name == row
    assert choose(q, jax.ShapeDtypeStruct(k.shape, jnp.bfloat16), spec, backend).name != "native decode kernel"


def test_explained_by_kind_of_layer() -> None:
    found = explain(CONFIGS["a window, and none"], Backend("tpu"), 4096)
    assert found["prompt, window of 40"] == found["piece of a prompt"] == "TPU flash kernel"
    assert found["token"] == found["token, window of 40"] == "TPU decode kernel"
    assert explain(CONFIGS["chunks"], Backend("cpu"), 4096)["piece of a prompt"] == "blocks of keys"


def test_what_is_merged_has_a_log_sum_exp() -> None:
    q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 1, 4, 64), (2, 2, 512, 64)))
    backend = Backend("tpu")
    assert choose(q, k, AttentionSpec(ROWS), backend, merges=True).name == "TPU flash kernel"
    assert all(row.merges for row in choice.ROWS if "decode kernel" not in row.name or row.name.startswith("GPU"))


# --- the plain forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [plain.by_key_blocks, plain.by_query_blocks, plain.formula])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_form_is_numpys_softmax(form, causal: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "QUERY_BLOCK", 12)
    monkeypatch.setattr(plain, "KEY_BLOCK", 16)
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((2, 24, 4, 8), (2, 2, 40, 8), (2, 2, 40, 8)))
    start, segments = np.array([16, 3]), np.sort(rng.integers(1, 3, (2, 40)), axis=1)
    mine = np.take_along_axis(segments, start[:, None] + np.arange(24)[None], axis=1)
    spec = AttentionSpec(jnp.asarray(start), causal=causal)
    if packed:
        spec = spec.replace(query_segments=jnp.asarray(mine), key_segments=jnp.asarray(segments))
    places = start[:, None, None] + np.arange(24)[None, :, None]
    seen = np.arange(40)[None, None] <= places if causal else np.ones((2, 24, 40), bool)
    seen = seen & (mine[:, :, None] == segments[:, None]) if packed else seen
    scores = np.einsum("bthd,bhsd->bhts", q, np.repeat(k, 2, axis=1)) / np.sqrt(8)
    weights = np.where(seen[:, None], np.exp(scores), 0)
    expected = np.einsum("bhts,bhsd->bthd", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=1))
    out, lse = form(*map(jnp.asarray, (q, k, v)), spec)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, np.log(weights.sum(-1)), atol=2e-6)
