"""Grouped products against NumPy's in float64, with the kernels of every platform, and what they cost on CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.backend import Backend
from qwen_jax.kernels.grouped import grouped_matmul
from qwen_jax.kernels.row_blocks import block_size, row_blocks
from qwen_jax.layers.moe import routed

# rows of each group; what is beyond them belongs to none
GROUPS = {
    "some empty": ([3, 0, 20, 1, 9], 37),
    "one row each": (np.bincount([3, 9, 9, 59], minlength=60).tolist(), 4),
    "all in one": ([0, 200, 0], 200),
    "none": ([0, 0], 5),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["cpu", "gpu", "tpu"])
def test_values_and_gradients(kernels: Any, dtype: str, groups: str) -> None:
    check(Backend(kernels, interpret=True), dtype, *GROUPS[groups])


def check(backend: Backend, dtype: str, sizes: list[int], num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    weight = jnp.asarray(rng.standard_normal((len(sizes), 48, 32)), dtype)
    rows = jnp.asarray(rng.standard_normal((num_rows, 32)), dtype)
    grouped = np.arange(num_rows) < sum(sizes)
    dy = jnp.asarray(np.where(grouped[:, None], rng.standard_normal((num_rows, 48)), 0), jnp.float32)

    with backend.entered():
        y, transposed = jax.vjp(
            lambda weight, rows: grouped_matmul(weight, rows, jnp.asarray(sizes), jnp.float32), weight, rows
        )
        d_weight, d_rows = transposed(dy)

    group = np.repeat(np.arange(len(sizes)), sizes)
    w, x, d = (np.asarray(array, np.float64) for array in (weight, rows, dy))
    want, want_rows, want_weight = np.zeros((num_rows, 48)), np.zeros((num_rows, 32)), np.zeros(w.shape)
    want[grouped] = np.einsum("roi,ri->ro", w[group], x[grouped])
    want_rows[grouped] = np.einsum("roi,ro->ri", w[group], d[grouped])
    np.add.at(want_weight, group, d[grouped][:, :, None] * x[grouped][:, None, :])
    assert y.dtype == jnp.float32 and d_rows.dtype == d_weight.dtype == weight.dtype
    # gradients are multiplied in, and rounded to, the operands' type; a float32 sum of n terms is off by sqrt(n) * 6e-8
    # where it is added up in order, as XLA does over the rows of a group, and values and d_rows have 32 and 48 terms
    rounding, over_rows = (2e-7, 6e-8 * np.sqrt(max(sizes))) if dtype == "float32" else (2**-8, 2**-8)
    found = (np.where(grouped[:, None], y, 0), 2e-7), (d_rows, rounding), (d_weight, over_rows)
    for (result, limit), exact in zip(found, (want, want_rows, want_weight), strict=True):
        assert np.linalg.norm(np.asarray(result, np.float64) - exact) <= limit * np.linalg.norm(exact)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("size", [1, 4, 16])
def test_blocks_hold_every_row_once(groups: str, size: int) -> None:
    sizes, num_rows = GROUPS[groups]
    group, start, count, number = map(np.asarray, row_blocks(num_rows, jnp.asarray(sizes), size))
    held = [(int(g), int(s + i)) for g, s, c in zip(group, start, count, strict=True) for i in range(c)]
    assert held == list(zip(np.repeat(np.arange(len(sizes)), sizes), range(sum(sizes)), strict=True))
    assert number == np.count_nonzero(count) and np.all(count[:number] > 0)


@pytest.mark.parametrize("tokens", [1, 8, 256])
def test_experts_on_cpu_compute_only_their_rows(tokens: int) -> None:
    """XLA counts the body of the loop once: it is one block of rows, and there are no more blocks than are needed."""
    num_experts, top_k, width, features = 60, 4, 64, 48
    rng = np.random.default_rng(0)
    kernels = tuple(
        jnp.zeros((num_experts, *shape)) for shape in ((features, width), (features, width), (width, features))
    )
    chosen = np.argsort(rng.random((tokens, num_experts)), axis=1)[:, :top_k]
    arguments = jnp.zeros((tokens, width)), jnp.asarray(chosen, jnp.int32), jnp.zeros((tokens, top_k)), kernels
    compiled = jax.jit(routed).lower(*arguments).compile()
    rows = tokens * top_k
    size = block_size(rows, num_experts, 4, 64)
    blocks = int(np.sum(-(-np.bincount(chosen.reshape(-1), minlength=num_experts) // size)))
    needed = 2 * rows * 3 * width * features
    one_block = 2 * size * 3 * width * features
    cost = compiled.cost_analysis()
    assert cost is not None
    assert "ragged" not in compiled.as_text() and cost["flops"] <= 2 * one_block + 100 * rows * width
    assert blocks * one_block <= 8 * needed  # a block of four for a single row, or 30 rows a group in blocks of 32


def test_xla_still_multiplies_everything_on_cpu() -> None:
    """Why the blocks are there: once this fails, `lax.ragged_dot_general` is enough."""
    weight, rows, sizes = jnp.zeros((60, 16, 32)), jnp.zeros((8, 32)), jnp.zeros(60, jnp.int32)
    with Backend("tpu").entered():
        cost = jax.jit(grouped_matmul, static_argnums=3).lower(weight, rows, sizes, "float32").compile().cost_analysis()
    assert cost is not None and cost["flops"] > 30 * 2 * 8 * 16 * 32
