"""Decode attention against a brute force in float64 of our own, in interpreter mode."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels import decode_gpu
from qwen_jax.kernels.decode import decode_attention, decode_reference, paged_decode_attention, pages_of

BATCH, LAYERS, LAYER = 3, 2, 1
TOLERANCE = {"float32": 2e-6, "int8": 2e-6, "bfloat16": 1e-2}


class Case(NamedTuple):
    heads: tuple[int, int]
    head_dim: int
    dtype: str
    capacity: int
    block: int  # or the length of a page
    chunk_length: int | None = None
    splits: int = 1


CONTIGUOUS = [
    Case((14, 2), 64, "float32", 300, 128),
    Case((7, 1), 128, "bfloat16", 384, 128, splits=2),
    Case((4, 4), 64, "float32", 600, 128, chunk_length=128, splits=3),
    Case((8, 1), 128, "int8", 520, 256, splits=2),
    Case((10, 2), 64, "int8", 384, 128, chunk_length=256),
]
PAGED = [
    Case((14, 2), 64, "float32", 384, 128, splits=2),
    Case((7, 1), 128, "bfloat16", 160, 16, chunk_length=64),
    Case((4, 4), 64, "int8", 96, 32),
]


def brute_force(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: Any, window: int, chunk_length: int | None
) -> np.ndarray:
    """One sequence and one head at a time, in float64; q [3, B, H, h], of which only [0] counts without chunks."""
    out = np.zeros(q.shape[1:])
    for b, h in np.ndindex(*out.shape[:2]):
        head = h // (q.shape[2] // k.shape[1])
        keys = np.arange(max(0, lengths[b] - window), lengths[b])
        chunk = chunk_length or 10**9
        queries = q[np.minimum((lengths[b] - 1) // chunk - keys // chunk, 2), b, h]
        scores = np.sum(queries * k[b, head, keys], axis=-1) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(initial=-np.inf))
        if len(keys):
            out[b, h] = weights / weights.sum() @ v[b, head, keys]
    return out


def draw_cache(case: Case, rng: np.random.Generator, lengths: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """k, v and any scales as stored, [L, B, K, S(, h)], with NaN wherever nothing may be read; and k, v in float64."""
    shape = (LAYERS, BATCH, case.heads[1], case.capacity)
    dead = np.arange(case.capacity) >= np.asarray(lengths)[:, None, None]
    dead = np.broadcast_to(dead, shape) | (np.arange(LAYERS) != LAYER)[:, None, None, None]
    if case.dtype == "int8":
        codes = [rng.integers(-127, 128, (*shape, case.head_dim)).astype(np.int8) for _ in range(2)]
        scales = [np.exp(rng.standard_normal(shape)).astype(np.float32) / 100 for _ in range(2)]
        meant = [x[LAYER].astype(np.float64) * scale[LAYER][..., None] for x, scale in zip(codes, scales, strict=True)]
        return [*codes, *(np.where(dead, np.nan, scale) for scale in scales)], meant
    arrays = [rng.standard_normal((*shape, case.head_dim)).astype(jnp.dtype(case.dtype)) for _ in range(2)]
    meant = [x[LAYER].astype(np.float64) for x in arrays]
    return [np.where(dead[..., None], np.asarray(np.nan, x.dtype), x) for x in arrays], meant


def draw_queries(case: Case, rng: np.random.Generator) -> np.ndarray:
    dtype = jnp.bfloat16 if case.dtype == "bfloat16" else np.float32
    return rng.standard_normal((3, BATCH, case.heads[0], case.head_dim)).astype(dtype)


def check(case: Case, out: jax.Array, q: np.ndarray, meant: list[np.ndarray], lengths: Any, window: int) -> None:
    expected = brute_force(q.astype(np.float64), *meant, lengths, window, case.chunk_length)
    assert out.dtype == q.dtype
    error = np.linalg.norm(np.asarray(out, np.float64) - expected)
    assert error <= TOLERANCE[case.dtype] * np.linalg.norm(expected)  # false too where anything is NaN


def contiguous(case: Case, interpret: Any) -> Any:
    def run(q: Any, k: Any, v: Any, lengths: Any, layer: Any, window: Any, *scales: Any) -> jax.Array:
        k_scale, v_scale = scales or (None, None)
        return decode_attention(
            q if case.chunk_length else q[0], k, v, lengths, layer=layer, window=window, k_scale=k_scale,
            v_scale=v_scale, chunk_length=case.chunk_length, splits=case.splits, block=case.block, interpret=interpret,
        )  # fmt: skip

    return jax.jit(run)


def run_contiguous(run: Any, case: Case, lengths: list[int], window: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    (k, v, *scales), meant = draw_cache(case, rng, lengths)
    q = draw_queries(case, rng)
    out = run(q, k, v, np.asarray(lengths, np.int32), LAYER, window, *scales)
    check(case, out, q, meant, lengths, window)


def run_paged(run: Any, case: Case, lengths: list[int], window: int, seed: int) -> None:
    """The same cache in shuffled pages, all else NaN, and table entries that nothing needs out of range."""
    rng = np.random.default_rng(seed)
    (k, v, *scales), meant = draw_cache(case, rng, lengths)
    q = draw_queries(case, rng)
    page, max_pages = case.block, case.capacity // case.block
    order = rng.permutation(BATCH * max_pages + 2)[: BATCH * max_pages].reshape(BATCH, max_pages)

    def into_pages(x: np.ndarray) -> np.ndarray:
        x = np.moveaxis(x.reshape(*x.shape[:3], max_pages, page, *x.shape[4:]), 2, 1)  # [L, K, B, max_pages, P, ...]
        pages = np.full((*x.shape[:2], BATCH * max_pages + 2, *x.shape[4:]), 77 if x.dtype == np.int8 else np.nan)
        pages[:, :, order] = x
        return pages.astype(x.dtype)

    tables = np.where(np.arange(max_pages) * page < np.asarray(lengths)[:, None], order, rng.choice([-1, 2**30]))
    scales = [np.swapaxes(into_pages(scale), 1, 2) for scale in scales]  # [L, N, K, P]
    out = run(q, into_pages(k), into_pages(v), lengths, tables, LAYER, window, *scales)
    check(case, out, q, meant, lengths, window)


def paged(case: Case, interpret: Any) -> Any:
    def run(q: Any, k: Any, v: Any, lengths: Any, tables: Any, layer: Any, window: Any, *scales: Any) -> jax.Array:
        k_scale, v_scale = scales or (None, None)
        return paged_decode_attention(
            q if case.chunk_length else q[0], k, v, lengths, tables, layer=layer, window=window, k_scale=k_scale,
            v_scale=v_scale, chunk_length=case.chunk_length, splits=case.splits, interpret=interpret,
        )  # fmt: skip

    jitted = jax.jit(run)
    return lambda q, k, v, lengths, tables, *rest: jitted(
        q, k, v, np.asarray(lengths, np.int32), np.asarray(tables, np.int32), *rest
    )


@pytest.mark.parametrize("case", CONTIGUOUS, ids=str)
def test_contiguous(case: Case) -> None:
    sweep(case, contiguous, run_contiguous)


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_paged(case: Case) -> None:
    sweep(case, paged, run_paged)


GPU = [
    Case((14, 2), 64, "float32", 300, 128, splits=2),
    Case((7, 1), 128, "bfloat16", 384, 64, splits=3),
    Case((4, 4), 64, "float32", 600, 128, chunk_length=100, splits=2),
    Case((40, 2), 64, "float32", 80, 128),
    Case((8, 1), 128, "int8", 520, 256, splits=2),
]
GPU_PAGED = [
    Case((14, 2), 64, "float32", 384, 128, splits=2),
    Case((7, 1), 128, "bfloat16", 160, 16, chunk_length=100),
    Case((4, 4), 64, "int8", 96, 24, splits=3),
    Case((8, 1), 128, "int8", 512, 64),
]


@pytest.mark.parametrize("case", GPU, ids=str)
def test_on_gpu(case: Case) -> None:
    check_on_gpu(case, interpret=True)


def check_on_gpu(case: Case, interpret: bool) -> None:
    """The kernel for GPUs: outputs, and the logarithms by which parts of a cache are merged."""

    @jax.jit
    def attend(q: Any, k: Any, v: Any, lengths: Any, window: Any, *scales: Any) -> Any:
        k_scale, v_scale = scales or (None, None)
        return decode_gpu.decode_attention(
            q if case.chunk_length else q[0], k, v, lengths, window=window, chunk_length=case.chunk_length,
            k_scale=k_scale, v_scale=v_scale, splits=case.splits, interpret=interpret,
        )  # fmt: skip

    for lengths, window in (([1, 77, case.capacity], 2**30), ([case.capacity, 64, 30], 33), ([33, 2, 70], 1)):
        rng = np.random.default_rng(0)
        (k, v, *scales), meant = draw_cache(case, rng, lengths)
        q = draw_queries(case, rng)
        here = (x[LAYER] for x in scales)
        out, lse = attend(q, k[LAYER], v[LAYER], np.asarray(lengths, np.int32), window, *here)
        check(case, out, q, meant, lengths, window)
        if not case.chunk_length:
            for b in range(BATCH):
                seen = meant[0][b, :, max(0, lengths[b] - window) : lengths[b]]
                scores = np.einsum("hd,hsd->hs", q[0, b], np.repeat(seen, case.heads[0] // case.heads[1], 0))
                expected = np.log(np.sum(np.exp(scores.astype(np.float64) / case.head_dim**0.5), axis=-1))
                np.testing.assert_allclose(lse[b], expected, rtol=1e-2 if case.dtype == "bfloat16" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("case", GPU_PAGED, ids=str)
def test_paged_on_gpu(case: Case) -> None:
    check_paged_on_gpu(case, interpret=True)


def check_paged_on_gpu(case: Case, interpret: bool) -> None:
    @jax.jit
    def attend(q: Any, k: Any, v: Any, lengths: Any, tables: Any, layer: Any, window: Any, *scales: Any) -> Any:
        k_scale, v_scale = (x[layer] for x in scales) if scales else (None, None)
        return decode_gpu.paged_decode_attention(
            q if case.chunk_length else q[0], k[layer], v[layer], lengths, tables, window=window,
            chunk_length=case.chunk_length, k_scale=k_scale, v_scale=v_scale, splits=case.splits, interpret=interpret,
        )[0]  # fmt: skip

    def run(q: Any, k: Any, v: Any, lengths: Any, tables: Any, *rest: Any) -> Any:
        return attend(q, k, v, np.asarray(lengths, np.int32), np.asarray(tables, np.int32), *rest)

    for lengths, window in (([1, 77, case.capacity], 2**30), ([case.capacity, 64, 0], 33), ([33, 2, 70], 1)):
        run_paged(run, case, lengths, window, 0)


def sweep(case: Case, make: Any, run_one: Any) -> None:
    """Any lengths, none included, and any window, in one compiled program."""
    run = make(case, True)

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.integers(0, case.capacity), min_size=BATCH, max_size=BATCH),
        st.integers(1, case.capacity) | st.just(2**31 - 1),
        st.integers(0, 9),
    )
    def one(lengths: list[int], window: int, seed: int) -> None:
        run_one(run, case, lengths, window, seed)

    one()
    for lengths in ([0] * BATCH, [case.capacity] * BATCH, [case.block, case.block + 1, case.block - 1]):
        run_one(run, case, lengths, 2**31 - 1, 0)


@pytest.mark.parametrize(
    ("case", "make", "run_one"),
    [
        pytest.param(CONTIGUOUS[2], contiguous, run_contiguous, id="chunks"),
        pytest.param(CONTIGUOUS[3], contiguous, run_contiguous, id="int8"),
        pytest.param(PAGED[0], paged, run_paged, id="pages"),
    ],
)
def test_no_races(case: Case, make: Any, run_one: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Simulated memory and transfers: two cores, no race, no read out of bounds, memory that begins as NaN."""
    case = case._replace(splits=2)
    run = make(case, pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    run_one(run, case, [case.capacity, 1, case.block], case.capacity // 2, 0)
    assert "RACE" not in capfd.readouterr().out


def test_reference() -> None:
    """The plain computation against the same brute force, pages of one layer included."""
    rng = np.random.default_rng(0)
    for case in CONTIGUOUS[1:4]:
        lengths, window = [case.capacity, 0, 200], 150
        (k, v, *scales), meant = draw_cache(case, rng, lengths)
        q = draw_queries(case, rng)
        k, v, *scales = (jnp.asarray(x[LAYER]) for x in (k, v, *scales))
        k_scale, v_scale = scales or (None, None)
        queries = jnp.asarray(q if case.chunk_length else q[0])
        out = decode_reference(
            queries, k, v, jnp.asarray(lengths), window=window, chunk_length=case.chunk_length, k_scale=k_scale,
            v_scale=v_scale,
        )  # fmt: skip
        check(case, out, q, meant, lengths, window)
    pages, tables = rng.standard_normal((2, 5, 4, 3)), np.array([[4, 0], [1, 2]])
    held = np.asarray(pages_of(jnp.asarray(pages), jnp.asarray(tables)))
    for b, head, token in np.ndindex(2, 2, 8):
        np.testing.assert_allclose(held[b, head, token], pages[head, tables[b, token // 4], token % 4], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_length": 128}, "3, B, H, h"),
        ({"v": jnp.zeros((2, 1, 256, 32))}, "must be alike"),
        ({"k": jnp.zeros((2, 1, 256, 64), jnp.int8), "v": jnp.zeros((2, 1, 256, 64), jnp.int8)}, "k_scale"),
        ({"block": 100}, "multiple of 128"),
        ({"q": jnp.zeros((3, 2, 4, 64)), "chunk_length": 100}, "multiple of 128"),
        ({"q": jnp.zeros((2, 3, 64)), "k": jnp.zeros((2, 2, 256, 64)), "v": jnp.zeros((2, 2, 256, 64))}, "heads"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = {"q": jnp.zeros((2, 4, 64)), "k": jnp.zeros((2, 1, 256, 64)), "v": jnp.zeros((2, 1, 256, 64))}
    with pytest.raises(InputError, match=message):
        decode_attention(**(arguments | {"lengths": jnp.ones(2, jnp.int32)} | changes), interpret=True)
