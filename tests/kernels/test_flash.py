"""Flash attention in the TPU interpreter against attention that writes every pair down, values and gradients."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels import flash, flash_tiles
from qwen_jax.kernels.flash import Blocks, flash_attention, flash_attention_lse

SMALL = Blocks(query=128, key=256, step=128, masked_step=128)
# float32 and bfloat16: largest difference over largest value
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}


def seen_pairs(
    batch: int,
    num_queries: int,
    num_keys: int,
    offset: Any,
    segments: tuple[Any, Any] | None = None,
    window: int | None = None,
) -> np.ndarray:
    """bool [B, T, S]: which keys a query sees."""
    query = np.broadcast_to(offset, (batch,))[:, None, None] + np.arange(num_queries)[None, :, None]
    key = np.arange(num_keys)[None, None]
    seen = (key <= query) & (key > query - (window or num_queries + num_keys + int(np.max(offset))))
    if segments is not None:
        seen &= (segments[0][:, :, None] == segments[1][:, None]) & (segments[1][:, None] != 0)
    return seen


def dense(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: np.ndarray, offset: Any, chunk: int | None
) -> tuple[Any, Any]:
    """Output and log-sum-exp from all the scores; q [N, B, T, H, h]. Rows that see nothing are 0."""
    _, batch, num_queries, num_heads, head_dim = q.shape
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, num_heads // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("nbthd,bhsd->nbhts", q, k) / head_dim**0.5
    if chunk is None:
        scores = scores[0]
    else:
        query = np.broadcast_to(offset, (batch,))[:, None] + np.arange(num_queries)[None]
        distance = query[:, None, :, None] // chunk - (np.arange(k.shape[2]) // chunk)[None, None, None]
        scores = jnp.where(distance <= 0, scores[0], jnp.where(distance == 1, scores[1], scores[2]))
    some = seen.any(axis=-1)[:, None]
    scores = jnp.where(seen[:, None], scores, -1e30)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen[:, None], jnp.exp(scores - lse[..., None]), 0.0)
    return jnp.einsum("bhts,bhsd->bthd", weights, v).astype(dtype), jnp.where(some, lse, 0)


def segments_of(kind: str, rng: np.random.Generator, batch: int, num_queries: int, num_keys: int, offset: int) -> Any:
    """Segments of `num_keys` tokens, of which the queries are those from `offset` on."""
    if kind == "none":
        return None
    keys = np.ones((batch, num_keys), np.int32)
    if kind == "lengths":  # ragged rows, right padded
        keys = (np.arange(num_keys)[None] < rng.integers(1, num_keys + 1, (batch, 1))).astype(np.int32)
    elif kind == "packed":
        keys = np.sort(rng.integers(1, 5, (batch, num_keys)).astype(np.int32), axis=1)
        keys[:, num_keys - num_keys // 8 :] = 0
    elif kind == "mixed":
        keys = rng.integers(0, 3, (batch, num_keys)).astype(np.int32)
    return keys[:, offset : offset + num_queries], keys


def errors(
    *,
    batch: int = 1,
    num_queries: int = 300,
    num_keys: int | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    offset: int = 0,
    traced: bool = False,
    window: int | None = None,
    chunk: int | None = None,
    segments: str = "none",
    poison: bool = False,
    dtype: Any = jnp.float32,
    forward: Blocks = SMALL,
    backward: Blocks = SMALL,
    span: int | None = None,
    interpret: Any = True,
    seed: int = 0,
) -> dict[str, float]:
    """Difference from the dense computation of output, log-sum-exp and the gradients of a loss of both."""
    rng = np.random.default_rng(seed)
    num_keys = num_keys or offset + num_queries

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = normal(1 if chunk is None else 3, batch, num_queries, heads[0], head_dim)
    k, v = normal(batch, heads[1], num_keys, head_dim), normal(batch, heads[1], num_keys, head_dim)
    d_out = normal(batch, num_queries, heads[0], head_dim)
    d_lse = jnp.asarray(rng.standard_normal((batch, heads[0], num_queries)), jnp.float32)
    ids = segments_of(segments, rng, batch, num_queries, num_keys, offset)
    seen = seen_pairs(batch, num_queries, num_keys, offset, ids, window)
    some = seen.any(axis=-1)[:, None]
    given = (q, k, v, d_out)
    if poison:
        padding, padding_keys = ids[0] == 0, ids[1] == 0
        given = (
            jnp.where(padding[None, :, :, None, None], jnp.nan, q),
            jnp.where(padding_keys[:, None, :, None], jnp.nan, k),
            jnp.where(padding_keys[:, None, :, None], jnp.nan, v),
            jnp.where(padding[:, :, None, None], jnp.nan, d_out),
        )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, where: Any) -> tuple[jax.Array, jax.Array]:
        out, lse = flash_attention_lse(
            q[0] if chunk is None else q,
            k,
            v,
            query_segments=None if ids is None else jnp.asarray(ids[0]),
            key_segments=None if ids is None else jnp.asarray(ids[1]),
            query_offset=where if traced else offset,
            window=window,
            chunk_length=chunk,
            forward_blocks=forward,
            backward_blocks=backward,
            span=span,
            interpret=interpret,
        )
        return out, jnp.where(some, lse, 0)

    @jax.jit
    def ours(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, where: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda *x: attend(*x, where), q, k, v)
        return *out, *vjp((d_out, d_lse))

    @jax.jit
    def wanted(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda *x: dense(*x, seen, offset, chunk), q, k, v)
        return *out, *vjp((d_out, d_lse))

    names = ("out", "lse", "dq", "dk", "dv")
    results = {}
    for name, a, b in zip(names, ours(*given, jnp.int32(offset)), wanted(q, k, v, d_out), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all(), name
        # with one key to a query the softmax has no gradient: h products / sqrt(h) cancel, and what is left rounds so
        cancels = name in ("dq", "dk") and seen.sum(axis=-1).max() <= 1
        smallest = head_dim**0.5 if cancels else 1e-3
        results[name] = float(np.abs(a - b).max() / max(np.abs(b).max(), smallest))
    return results


CASES = {
    "ragged length, wide heads": dict(num_queries=333, heads=(3, 1), head_dim=128, forward=Blocks(256, 256, 128, 256)),
    "window": dict(num_queries=420, window=100),
    "chunked prefill at a traced offset": dict(num_queries=130, num_keys=700, offset=333, traced=True),
    "packed documents": dict(batch=2, num_queries=640, segments="packed", poison=True),
    "rows of different length, poisoned padding": dict(batch=2, segments="lengths", poison=True, window=200),
    "keys in spans": dict(num_queries=600, span=256, segments="mixed"),
    "dual chunks of whole blocks": dict(num_queries=1100, chunk=256, heads=(2, 1)),
    "dual chunks of any length": dict(num_queries=130, num_keys=520, offset=389, chunk=100, traced=True, span=256),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_dense(case: dict[str, Any]) -> None:
    found = errors(**case)
    assert max(found.values()) <= TOLERANCE[jnp.float32], found


def test_equals_dense_bfloat16() -> None:
    found = errors(num_queries=300, heads=(7, 1), dtype=jnp.bfloat16, segments="packed", poison=True)
    assert max(found.values()) <= TOLERANCE[jnp.bfloat16], found


@pytest.mark.parametrize("case", [dict(window=150), dict(chunk=128, segments="mixed")], ids=["window", "chunks"])
def test_no_races(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Two simulated cores share the queries of one head; the detector prints what it finds."""
    monkeypatch.setattr(flash, "chip", lambda: flash.CHIPS["v5p"])
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    found = errors(num_queries=260, heads=(2, 1), interpret=interpret, span=256, **case)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    assert max(found.values()) <= TOLERANCE[jnp.float32], found


def test_equals_torch() -> None:
    """PyTorch's own attention in float64, with its own gradients."""
    rng = np.random.default_rng(0)
    shapes = [(1, 4, 200, 64), (1, 2, 200, 64), (1, 2, 200, 64), (1, 4, 200, 64)]
    q, k, v, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    out.backward(torch.tensor(d_out, dtype=torch.float64))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q = jnp.swapaxes(q, 1, 2)
        ours = flash_attention(q, k, v, forward_blocks=SMALL, backward_blocks=SMALL, interpret=True)
        return jnp.swapaxes(ours, 1, 2)

    ours, vjp = jax.vjp(attend, *map(jnp.asarray, (q, k, v)))
    wanted = [out.detach().numpy(), *(x.grad.numpy() for x in tensors if x.grad is not None)]
    for a, b in zip((ours, *vjp(jnp.asarray(d_out))), wanted, strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 2e-6 * np.abs(b).max()


def test_two_cores_share_one_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "chip", lambda: flash.CHIPS["v5p"])
    found = errors(num_queries=600, heads=(3, 1), segments="packed")
    assert max(found.values()) <= TOLERANCE[jnp.float32], found


def test_parts_merge_by_log_sum_exp() -> None:
    """Attention over two parts of the keys, merged by their logs as ring attention does, is attention over all."""
    rng = np.random.default_rng(0)
    shapes = [(1, 384, 2, 64), (1, 1, 384, 64), (1, 1, 384, 64)]
    q, k, v, d_out = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (*shapes, shapes[0]))
    options: dict[str, Any] = dict(forward_blocks=SMALL, backward_blocks=SMALL, interpret=True)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return flash_attention(q, k, v, **options)

    def merged(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        parts = [flash_attention_lse(q, k[:, :, :128], v[:, :, :128], **options)]
        parts.append(flash_attention_lse(q, k[:, :, 128:], v[:, :, 128:], query_offset=-128, **options))
        highest = jnp.maximum(parts[0][1], parts[1][1])
        weights = [jnp.exp(lse - highest) for _, lse in parts]  # the first 128 queries see nothing of the second part
        total = sum(weights)
        return sum(out * jnp.swapaxes(w / total, 1, 2)[..., None] for (out, _), w in zip(parts, weights, strict=True))

    for a, b in zip(
        jax.tree.leaves(_values_and_gradients(merged, (q, k, v), d_out)),
        jax.tree.leaves(_values_and_gradients(whole, (q, k, v), d_out)),
        strict=True,
    ):
        assert jnp.abs(a - b).max() <= 2e-6 * jnp.abs(b).max()


def _values_and_gradients(f: Any, args: Any, cotangent: jax.Array) -> Any:
    @jax.jit
    def run(*args: jax.Array) -> Any:
        out, vjp = jax.vjp(f, *args)
        return out, vjp(cotangent)

    return run(*args)


def test_one_chunk_is_plain_attention() -> None:
    """Within one chunk only the first rotation counts, even beside others that are NaN."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(s), jnp.float32)
        for s in ((1, 200, 2, 64), (1, 1, 200, 64)) + ((1, 1, 200, 64),)
    )
    three = jnp.stack([q, jnp.full_like(q, jnp.nan), jnp.full_like(q, jnp.nan)])
    options: dict[str, Any] = dict(forward_blocks=SMALL, backward_blocks=SMALL, interpret=True)
    chunked = flash_attention(three, k, v, chunk_length=200, **options)
    np.testing.assert_array_equal(chunked, flash_attention(q, k, v, **options))


@st.composite
def extents(draw: st.DrawFn) -> flash_tiles.Extent:
    query_block, key_block = draw(st.sampled_from([2, 4])), draw(st.sampled_from([2, 4]))
    return flash_tiles.Extent(
        query_block,
        key_block,
        draw(st.sampled_from([3, 8])),  # few shapes, each of which compiles where traced
        draw(st.sampled_from([9, 12])),
        draw(st.none() | st.integers(1, 12)),
        draw(st.none() | st.integers(1, 12)),
    )


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(extents(), st.integers(-8, 16), st.booleans())
def test_tiles_cover_what_is_seen(extent: flash_tiles.Extent, offset: int, per_variant: bool) -> None:
    check_tiles(extent, offset, False, None, per_variant)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(extents(), st.integers(0, 16), st.none() | st.integers(0, 1000), st.booleans(), st.booleans())
def test_traced_tiles_cover_what_is_seen(
    extent: flash_tiles.Extent, offset: int, seed: int | None, traced: bool, per_variant: bool
) -> None:
    check_tiles(extent, offset, traced, seed, per_variant)


def check_tiles(extent: flash_tiles.Extent, offset: int, traced: bool, seed: int | None, per_variant: bool) -> None:
    """Every pair that is seen lies in one walked tile of its variant, and a tile without a mask holds nothing else."""
    shape = extent.num_query_blocks * extent.query_block, extent.num_key_blocks * extent.key_block
    ids = None
    if seed is not None:
        rng = np.random.default_rng(seed)
        ids = [np.sort(rng.integers(0, 4, (1, n)), axis=1).astype(np.int32) for n in shape]
        for segments, length in zip(ids, (extent.num_queries, extent.num_keys), strict=True):
            segments[:, length:] = 0
    # a query past the last may see what it likes, in tiles that are walked anyway
    allowed = np.zeros(shape, bool)
    segments = None if ids is None else (ids[0], ids[1][:, : extent.num_keys])
    allowed[:, : extent.num_keys] = seen_pairs(1, shape[0], extent.num_keys, offset, segments, extent.window)[0]
    seen = allowed & (np.arange(shape[0]) < extent.num_queries)[:, None]
    distance = np.zeros(seen.shape, int)
    if extent.chunk_length is not None:
        chunks = [
            (np.arange(n) + first) // extent.chunk_length for n, first in zip(seen.shape, (offset, 0), strict=True)
        ]
        distance = np.clip(chunks[0][:, None] - chunks[1][None], 0, 2)

    def walk(at: Any, segments: Any) -> tuple[Any, Any]:
        return flash_tiles.tiles(extent, at, *(segments or (None, None)), per_variant=per_variant)

    if traced:
        table, length = jax.jit(walk)(jnp.asarray([offset]), ids)
    elif ids is None:
        table, length = walk(offset, None)
    else:
        table, length = jax.jit(functools.partial(walk, offset))(ids)
    words = np.asarray(table)[0, 0, : int(length)]
    left, runs = seen.copy(), []
    for word in words:
        i, variant, j = word >> 18, word >> 4 & 3, word >> 6 & 4095
        rows = slice(i * extent.query_block, (i + 1) * extent.query_block)
        tile = rows, slice(j * extent.key_block, (j + 1) * extent.key_block)
        here = seen[tile] & (distance[tile] == variant)
        if word & flash_tiles.LIVE:
            assert (left[tile] & here).sum() == here.sum()  # once
            left[tile] &= ~here
            assert word & flash_tiles.MASKED or (allowed[tile] & (distance[tile] == variant)).all()
        else:
            assert not here.any()
        runs.append(((i, variant) if per_variant else (i,), word))
    assert not left.any()
    names = [name for name, _ in runs]
    assert names == sorted(names)
    for n, (name, word) in enumerate(runs):
        assert bool(word & flash_tiles.FIRST) == (n == 0 or names[n - 1] != name)
        assert bool(word & flash_tiles.LAST) == (n == len(runs) - 1 or names[n + 1] != name)
    assert len(set(names)) == extent.num_query_blocks * (extent.variants if per_variant else 1)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(k=(1, 3, 128, 64)), "K dividing H"),
        (dict(q=(1, 128, 4, 64), chunk_length=16), r"q \[3, B, T, H, h\]"),
        (dict(window=0), "window of at least 1"),
        (dict(query_segments=(1, 128)), "give both or neither"),
        (dict(query_segments=(1, 128), key_segments=(1, 127)), "query_segments .1, 128. and key_segments .1, 128."),
        (dict(query_offset=(3,)), "one query_offset"),
    ],
)
def test_bad_input(change: dict[str, Any], said: str) -> None:
    shapes = dict(q=(1, 128, 4, 64), k=(1, 2, 128, 64), v=(1, 2, 128, 64)) | change
    if "k" in change:
        shapes["v"] = change["k"]
    arguments = {
        name: jnp.zeros(x, jnp.int32 if name not in "qkv" else jnp.float32) if isinstance(x, tuple) else x
        for name, x in shapes.items()
    }
    with pytest.raises(InputError, match=said):
        flash_attention(**arguments, interpret=True)


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    groups, kv_heads = draw(st.sampled_from([1, 2, 3, 7])), draw(st.sampled_from([1, 2]))
    offset = draw(st.sampled_from([0, 0, 1, 127, 128, 200, 400]))
    blocks = [
        Blocks(
            draw(st.sampled_from([128, 256])),
            draw(st.sampled_from([128, 256, 512])),
            128,
            draw(st.sampled_from([128, 256])),
        )
        for _ in range(2)
    ]
    segments = draw(st.sampled_from(["none", "none", "lengths", "packed", "mixed"]))
    num_queries = draw(st.integers(1, 520))
    return dict(
        batch=draw(st.integers(1, 2)),
        num_queries=num_queries,
        num_keys=offset + num_queries + draw(st.sampled_from([0, 0, 1, 100])),
        heads=(groups * kv_heads, kv_heads),
        head_dim=draw(st.sampled_from([64, 128])),
        offset=offset,
        traced=draw(st.booleans()),
        window=draw(st.none() | st.sampled_from([1, 7, 128, 300])),
        chunk=draw(st.none() | st.sampled_from([5, 100, 128, 256, 1000])),
        segments=segments,
        poison=segments != "none",
        dtype=draw(st.sampled_from([jnp.float32, jnp.bfloat16])),
        forward=blocks[0],
        backward=blocks[1],
        span=draw(st.sampled_from([None, 128, 512])),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.slow
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(attentions())
def test_sweep(case: dict[str, Any]) -> None:
    found = errors(**case)
    assert max(found.values()) <= TOLERANCE[case["dtype"]], found
