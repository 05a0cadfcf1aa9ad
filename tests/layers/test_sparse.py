"""Sparse prefill against dense attention under a mask that is written out pair by pair."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.decode import prefill
from qwen_jax.config import DualChunk, ModelConfig, SparsePrefill, load_config
from qwen_jax.errors import InputError
from qwen_jax.kernels.choice import attend_lse
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.layers import sparse as sparse_module
from qwen_jax.layers.rope import rotary_tables, rotate
from qwen_jax.layers.sparse import SparseBudget, sparse_attention
from qwen_jax.model import init, unstack
from tests.infer import tiny

CHUNK = DualChunk(chunk_size=120, local_size=24, original_length=0)  # chunks of 96
START, QUERIES, SLOTS = 100, 150, 260  # a piece of 150 queries after 100 keys; the cache has room for ten more
BLOCK, LAST = 16, 8


def mask_by_hand(weights: np.ndarray, vertical: int, slash: int) -> np.ndarray:
    """bool [QUERIES, SLOTS] of one head, from the attention [LAST, SLOTS] of the last queries."""
    column_score = weights.sum(0)
    column_score[:4] = np.inf
    diagonal_score = np.zeros(SLOTS)
    for i, row in enumerate(weights):
        position = START + QUERIES - LAST + i
        for j in range(position + 1):
            diagonal_score[position - j] += row[j]
    diagonal_score[:6] = np.inf
    columns = np.argsort(-column_score, kind="stable")[:vertical]
    diagonals = np.argsort(-diagonal_score, kind="stable")[:slash]
    seen = np.zeros((QUERIES, SLOTS), bool)
    for i in range(QUERIES):
        first = START + i // BLOCK * BLOCK
        seen[i, columns] = True
        for distance in diagonals:
            seen[i, max(first - distance, 0) : max(first + BLOCK - distance, 0)] = True
        seen[i, START + i + 1 :] = False
    return seen


@pytest.mark.parametrize("chunk", [None, CHUNK], ids=["plain", "dual_chunk"])
def test_equals_dense_attention_under_the_mask(chunk, monkeypatch):
    for name, value in {
        "BLOCK": BLOCK, "GATHERED": 24, "LAST_QUERIES": LAST, "FIRST_COLUMNS": 4, "NEAREST_DIAGONALS": 6,
    }.items():  # fmt: skip
        monkeypatch.setattr(sparse_module, name, value)
    rng = np.random.default_rng(8)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, n, heads, 8)), jnp.float32) for n, heads in ((150, 4), (260, 2), (260, 2))
    )
    config = dataclasses.replace(tiny.CONFIG, dual_chunk=chunk)
    at, slots = START + jnp.arange(QUERIES)[None], jnp.arange(SLOTS)[None]
    turn = rotary_tables(config, at, dual_chunk=bool(chunk), sparse=bool(chunk))
    queries = jnp.stack([rotate(q, tables) for tables in turn.query])
    k, v = (
        jnp.swapaxes(rotate(k, rotary_tables(config, slots, dual_chunk=bool(chunk)).key), 1, 2),
        jnp.swapaxes(v, 1, 2),
    )
    budgets = [(4, 6), (9, 20), (30, 11), (260, 260)]  # the last reads everything
    vertical, slash = (jnp.asarray(x) for x in zip(*budgets, strict=True))
    budget = SparseBudget(vertical, slash, jnp.asarray([QUERIES - 1]), jnp.ones(1, bool), 260, 260)
    spec = AttentionSpec(at[:, 0], chunk_length=chunk.chunk_length if chunk else None)
    out, lse = sparse_attention(queries if chunk else queries[0], k, v, spec, budget)
    dense, dense_lse = attend_lse(queries[:3] if chunk else queries[0], k, v, spec)

    def scores(variants, head):
        """[QUERIES, SLOTS] of numpy products, each pair by the query variant of its distance in chunks."""
        found = [np.asarray(x[0, :, head]) @ np.asarray(k[0, head // 2]).T / np.sqrt(8) for x in variants]
        length = chunk.chunk_length if chunk else SLOTS
        apart = np.clip((np.asarray(at)[0] // length)[:, None] - np.arange(SLOTS)[None] // length, 0, 2)
        return np.choose(apart, found if chunk else found * 3)

    causal = np.arange(SLOTS)[None] <= np.asarray(at)[0][:, None]
    for head, (columns, diagonals) in enumerate(budgets):
        choosers = (queries[0], *queries[3:]) if chunk else (queries[0],)
        chosen_by = np.where(causal, np.exp(scores(choosers, head)), 0)[-LAST:]
        seen = mask_by_hand(chosen_by / chosen_by.sum(-1, keepdims=True), columns, diagonals)
        weights = np.where(seen, np.exp(scores(queries[:3] if chunk else queries[:1], head)), 0)
        np.testing.assert_allclose(lse[0, head], np.log(weights.sum(-1)), atol=1e-5)
        expected = weights / weights.sum(-1, keepdims=True) @ np.asarray(v[0, head // 2])
        np.testing.assert_allclose(out[0, :, head], expected, atol=1e-5)
        assert seen.all(where=causal) == (head == 3)
    np.testing.assert_allclose(out[:, :, 3], dense[:, :, 3], atol=1e-5)
    recall = np.exp(np.asarray(lse - dense_lse))[0].mean(-1)
    assert 0 < recall[0] < 1 and recall[3] == pytest.approx(1, abs=1e-5)


# --- in the model -----------------------------------------------------------------------------------------------------


def sparse_config(columns: int, diagonals: int, threshold: int) -> ModelConfig:
    budgets = [((n,) * 4,) * 2 for n in (columns, diagonals)]
    sparse = SparsePrefill(budgets[0], budgets[1], threshold=threshold)
    return dataclasses.replace(tiny.CONFIG, dual_chunk=CHUNK, sparse_prefill=sparse)


@pytest.mark.parametrize("stacked", [pytest.param(True, marks=pytest.mark.slow), False], ids=["scanned", "unrolled"])
def test_prefill_beyond_the_threshold(stacked):
    """Budgets for everything change nothing, small ones do, and beyond the threshold only, row by row."""
    params = init(sparse_config(1, 1, 0), jax.random.key(0))
    params = params if stacked else unstack(params)
    tokens = np.random.default_rng(9).integers(0, 256, (2, 700)).astype(np.int32)
    limits, never = np.full(2, 8, np.int32), np.array([-1], np.int32)

    def logprobs(config):
        lengths, fixed = np.array([700, 130], np.int32), {"vocab_size": 263, "num_top": 263, "capacity": 710}
        produced = prefill(params, tokens, lengths, limits, None, never, config=config, piece=256, **fixed)[1]
        order = np.argsort(produced.top_tokens, axis=-1)
        return np.take_along_axis(np.asarray(produced.top_logprobs), order, axis=-1)

    dense = logprobs(dataclasses.replace(sparse_config(1, 1, 0), sparse_prefill=None))
    np.testing.assert_allclose(logprobs(sparse_config(800, 800, 600)), dense, atol=1e-4)
    np.testing.assert_array_equal(logprobs(sparse_config(31, 50, 700)), dense)
    sparse = logprobs(sparse_config(31, 50, 600))
    assert np.abs(sparse - dense)[0].max() > 1e-3
    np.testing.assert_allclose(sparse[1], dense[1], atol=1e-4)


def test_budgets_are_read_from_their_file(tmp_path):
    config = sparse_config(30, 800, 1000)
    mapping = config.to_hf()
    assert ModelConfig.from_hf(mapping) == config
    declared = mapping["dual_chunk_attention_config"]
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps(declared.pop("sparse_attention_config")))
    (tmp_path / "config.json").write_text(json.dumps(mapping))
    assert load_config(tmp_path) == config
    declared["sparse_attention_enabled"] = False
    (tmp_path / "config.json").write_text(json.dumps(mapping))
    assert load_config(tmp_path).sparse_prefill is None


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ([{"0": ["vertical_and_slash", 30, 800, 1]}], "does not give 4 heads of 2 layers"),
        ([{str(i): ["block_sparse", 30, 800, 1] for i in range(4)}] * 2, "is not a mapping of every head"),
    ],
)
def test_budgets_of_another_model(budgets, said):
    mapping = sparse_config(30, 800, 1000).to_hf()
    mapping["dual_chunk_attention_config"]["sparse_attention_config"] = budgets
    with pytest.raises(InputError, match=said):
        ModelConfig.from_hf(mapping)
