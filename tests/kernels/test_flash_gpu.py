"""Flash attention for GPUs: interpreted, against PyTorch's float64 autograd; lowered for CUDA; run where a GPU is."""

import importlib.util
import os
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from qwen_jax.errors import InputError
from qwen_jax.kernels.flash_gpu import Blocks, Plan, flash_attention, flash_attention_lse

SMALL = Plan(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1))
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


class Case(NamedTuple):
    queries: int
    keys: int
    heads: tuple[int, int]
    head_dim: int
    dtype: str = "float32"
    windowed: bool = False
    chunk_length: int | None = None
    segmented: bool = False
    batch: int = 2
    offset: int | None = None  # known when compiled, and the same in every row


CASES = [
    Case(64, 64, (7, 1), 64),
    Case(40, 70, (2, 1), 128, "bfloat16", windowed=True),
    Case(50, 110, (2, 2), 64, chunk_length=32),
    Case(70, 128, (2, 1), 64, chunk_length=32, offset=32),
    Case(50, 110, (3, 1), 64, windowed=True, chunk_length=24),
    Case(90, 90, (4, 2), 64, segmented=True),
    Case(70, 70, (2, 1), 64, "bfloat16", windowed=True, chunk_length=32, segmented=True),
]


def expected(case: Case, arrays: list[np.ndarray], cotangents: list[np.ndarray], scalars: Any, segments: Any) -> Any:
    """out, log-sum-exp and the gradients of q, k and v, by PyTorch in float64, and which queries see anything."""
    offset, window = scalars
    q, k, v = (torch.tensor(np.nan_to_num(x.astype(np.float64)), requires_grad=True) for x in arrays)
    groups = case.heads[0] // case.heads[1]
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("nbthd,bhsd->nbhts", q, keys) / case.head_dim**0.5
    query = torch.tensor(offset)[:, None, None] + torch.arange(case.queries)[None, :, None]
    key = torch.arange(case.keys)[None, None]
    seen = key <= query
    if case.windowed:
        seen = seen & (key > query - window)
    if segments is not None:
        mine, theirs = (torch.tensor(x) for x in segments)
        seen = seen & (mine[:, :, None] == theirs[:, None]) & (mine != 0)[:, :, None]
    seen = seen.expand(case.batch, -1, -1)[:, None]
    if case.chunk_length:
        back = (query // case.chunk_length - key // case.chunk_length).clamp(0, 2)
        back = back.expand(case.batch, -1, -1)[None, :, None].expand(1, -1, case.heads[0], -1, -1)
        scores = scores.gather(0, back)
    scores = scores[0].masked_fill(~seen, -1e30)
    lse = torch.logsumexp(scores, -1)
    out = torch.einsum("bhts,bhsd->bthd", torch.exp(scores - lse[..., None]) * seen, values)
    any_seen = seen.any(-1).expand(lse.shape)
    d_out, d_lse = (torch.tensor(np.nan_to_num(x.astype(np.float64))) for x in cotangents)
    ((out * d_out).sum() + (lse * d_lse * any_seen).sum()).backward()
    return [x.detach().numpy() for x in (out, lse, q.grad, k.grad, v.grad)], any_seen.numpy()


def make(case: Case, plan: Plan | None, interpret: bool) -> Any:
    """A compiled function of q, k, v, the cotangents, offset and window [B], and any segments."""

    def run(q: Any, k: Any, v: Any, d_out: Any, d_lse: Any, offset: Any, window: Any, segments: Any) -> Any:
        mine, theirs = segments or (None, None)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return flash_attention_lse(
                q if case.chunk_length else q[0],
                k,
                v,
                query_segments=mine,
                key_segments=theirs,
                query_offset=offset if case.offset is None else case.offset,
                window=window if case.windowed else None,
                chunk_length=case.chunk_length,
                plan=plan,
                interpret=interpret,
            )

        results, pullback = jax.vjp(attend, q, k, v)
        return *results, *pullback((d_out, d_lse))

    return jax.jit(run)


def check(run: Any, case: Case, offset: list[int], window: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    (heads, num_kv_heads), width = case.heads, case.head_dim
    q = draw(3 if case.chunk_length else 1, case.batch, case.queries, heads, width)
    k, v = (draw(case.batch, num_kv_heads, case.keys, width) for _ in range(2))
    d_out = draw(case.batch, case.queries, heads, width)
    d_lse = rng.standard_normal((case.batch, heads, case.queries)).astype(np.float32)
    nan, segments = np.asarray(np.nan, dtype), None
    if case.segmented:
        # documents in order, then padding, as rows of training data are; the padding of queries and keys differs
        ends = np.sort(rng.integers(1, case.keys + 1, (case.batch, 3)))
        ids = np.sum(np.arange(case.keys)[None, :, None] >= ends[:, None], axis=-1) + 1
        theirs = np.where(ids == 4, 0, ids).astype(np.int32)
        mine = np.where(rng.random((case.batch, 1)) < 0.5, np.where(ids == 3, 0, theirs), theirs).astype(np.int32)
        segments = mine, theirs
        k, v = (np.where((theirs == 0)[:, None, :, None], nan, x) for x in (k, v))
        q, d_out = (np.where((mine == 0)[:, :, None, None], nan, x) for x in (q, d_out))
    # what lies beyond the last query, which nothing sees, may be anything
    beyond = np.arange(case.keys) >= np.asarray(offset)[:, None] + case.queries
    k, v = (np.where(beyond[:, None, :, None], nan, x) for x in (k, v))

    got = run(q, k, v, d_out, d_lse, np.asarray(offset, np.int32), np.int32(window), segments)
    wanted, any_seen = expected(case, [q, k, v], [d_out, d_lse], (offset, window), segments)
    assert got[0].dtype == dtype and got[1].dtype == jnp.float32
    lse = np.asarray(got[1], np.float64)
    assert np.all(lse[~any_seen] < -1e29)
    pairs = [(np.asarray(x, np.float64), y) for x, y in zip(got, wanted, strict=True)]
    pairs[1] = np.where(any_seen, lse, 0), np.where(any_seen, wanted[1], 0)
    for x, y in pairs:
        assert np.linalg.norm(x - y) <= TOLERANCE[case.dtype] * np.linalg.norm(y)  # false too where anything is NaN


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case) -> None:
    """Any offset, window and segments, in one compiled program."""
    run = make(case, SMALL, True)
    room = case.keys - case.queries

    @settings(max_examples=6, deadline=None)
    @given(
        st.lists(st.integers(0, room), min_size=case.batch, max_size=case.batch),
        st.integers(1, case.keys) | st.just(2**31 - 1),
        st.integers(0, 99),
    )
    def one(offset: list[int], window: int, seed: int) -> None:
        check(run, case, offset if case.offset is None else [case.offset] * case.batch, window, seed)

    one()


def arguments(case: Case) -> tuple[Any, ...]:
    array = jax.ShapeDtypeStruct
    (heads, num_kv_heads), width, dtype = case.heads, case.head_dim, jnp.dtype(case.dtype)
    q = array((3 if case.chunk_length else 1, case.batch, case.queries, heads, width), dtype)
    k = array((case.batch, num_kv_heads, case.keys, width), dtype)
    d_lse = array((case.batch, heads, case.queries), jnp.float32)
    segments = tuple(array((case.batch, n), jnp.int32) for n in (case.queries, case.keys)) if case.segmented else None
    scalars = array((case.batch,), jnp.int32), array((), jnp.int32)
    return q, k, k, array(q.shape[1:], dtype), d_lse, *scalars, segments


LARGE = [
    Case(1024, 1024, (14, 2), 64, "bfloat16", segmented=True, batch=1),
    Case(600, 2200, (7, 1), 128, "bfloat16", windowed=True, chunk_length=1024, batch=1),
    Case(1536, 2048, (7, 1), 128, "bfloat16", chunk_length=512, batch=1, offset=512),
    Case(512, 512, (28, 4), 128, "float32", batch=1),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_lowers_for_cuda(case: Case) -> None:
    device = AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
        lowered = make(case, None, False).trace(*arguments(case)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    for name in ("flash_forward", "flash_d_query", "flash_d_key"):
        assert f'name = "{name}"' in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_length": 32}, "3, B, T, H, h"),
        ({"v": jnp.zeros((2, 2, 9, 64))}, "must be alike"),
        ({"q": jnp.zeros((2, 8, 3, 64))}, "multiple of"),
        (
            {"q": jnp.zeros((2, 8, 4, 48)), "k": jnp.zeros((2, 2, 8, 48)), "v": jnp.zeros((2, 2, 8, 48))},
            "powers of two",
        ),
        ({"key_segments": jnp.zeros((2, 8), jnp.int32)}, "together"),
        ({"key_segments": jnp.zeros((2, 9), jnp.int32), "query_segments": jnp.zeros((2, 8), jnp.int32)}, "must be"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    given = {"q": jnp.zeros((2, 8, 4, 64)), "k": jnp.zeros((2, 2, 8, 64)), "v": jnp.zeros((2, 2, 8, 64))} | changes
    with pytest.raises(InputError, match=message):
        flash_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given, interpret=True)


ON_DEVICE = """
from tests.kernels.test_flash_gpu import LARGE, check, make
for case in LARGE:
    run = make(case, None, False)
    check(run, case, [case.keys - case.queries] * case.batch, 700, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("nvidia-smi") is None or importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="No NVIDIA GPU, or JAX's plugin for it is not installed",
)
def test_on_a_gpu() -> None:
    """The kernels as they are compiled, on the device, in a process of its own: this one is held to the CPU."""
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    run = subprocess.run([sys.executable, "-c", ON_DEVICE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
