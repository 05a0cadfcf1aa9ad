"""Products with dense and packed weights are NumPy's in float64, for one row, for few and for many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels.cpu import FEW_ROWS
from qwen_jax.leaves import Packed, PackedExperts, grouped_matmul, lookup, matmul


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_in", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(rows: int, dtype: str, num_in: int, packed: bool) -> None:
    shape = (3, 5, 16) if num_in == 1 else (16, 3, 5)
    rng = np.random.default_rng(rows)
    kernel = jnp.asarray(rng.standard_normal(shape), dtype)
    x = jnp.asarray(rng.standard_normal((rows, 1, *shape[-num_in:])), dtype)
    dy = jnp.asarray(rng.standard_normal((rows, 1, *shape[:-num_in])), dtype)

    weight = Packed((kernel[:7], kernel[7:]), 0) if packed and num_in == 2 else Packed((kernel,)) if packed else kernel
    y, transposed = jax.vjp(lambda weight, x: matmul(weight, x, num_in), weight, x)
    d_weight, dx = transposed(dy.astype(y.dtype))
    d_kernel = d_weight.dense() if packed else d_weight

    exact = np.asarray(kernel, np.float64).reshape(-1, 16 if num_in == 1 else 15)
    flat = np.asarray(x, np.float64).reshape(rows, -1)
    dy_flat = np.asarray(dy, np.float64).reshape(rows, -1)
    want = (flat @ exact.T, dy_flat.T @ flat, dy_flat @ exact)
    assert y.dtype == jnp.float32
    for result, like, reference in zip((y, d_kernel, dx), (dy, kernel, x), want, strict=True):
        assert result.shape == like.shape
        # sums of at most 65 products in float32; gradients are rounded once to their own type
        tolerance = 2e-6 if result.dtype == jnp.float32 else 2**-8
        error = np.linalg.norm(np.asarray(result, np.float64).reshape(reference.shape) - reference)
        assert error <= tolerance * np.linalg.norm(reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_experts(dtype: str) -> None:
    rng = np.random.default_rng(0)
    weight, rows = jnp.asarray(rng.standard_normal((3, 8, 16)), "bfloat16"), rng.standard_normal((9, 16))
    packed, rows = PackedExperts.pack(weight), jnp.asarray(rows, dtype)
    np.testing.assert_array_equal(packed.dense(), weight)
    matrices = np.asarray(weight, np.float64)[np.repeat(np.arange(3), [2, 0, 7])]
    wanted = np.einsum("roi,ri->ro", matrices, np.asarray(rows, np.float64))
    found = grouped_matmul(packed, rows, jnp.asarray([2, 0, 7]))
    assert packed.dtype == jnp.bfloat16 and np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_served_experts_are_not_widened_whole() -> None:
    """XLA:CPU would convert all of a bfloat16 stack to take a matrix out of it."""
    packed = PackedExperts.pack(jnp.zeros((60, 176, 256), jnp.bfloat16))
    rows, sizes = jnp.zeros((4, 256), jnp.bfloat16), jnp.zeros(60, jnp.int32)
    compiled = jax.jit(grouped_matmul).lower(packed, rows, sizes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < packed.bits.nbytes // 8


def test_lookup_of_rows_that_are_not_there() -> None:
    table = jnp.arange(12.0).reshape(4, 3)
    ids = jnp.array([[3, 4], [0, 100]])
    for weight in (table, Packed((table,))):
        found = lookup(weight, ids)
        np.testing.assert_array_equal(found, [[[9, 10, 11], [0, 0, 0]], [[0, 1, 2], [0, 0, 0]]])
