"""`project` multiplies differently for one row, for few and for many; every way is NumPy's product in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.layers.linear import FEW_ROWS, project


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_in", [1, 2])
def test_values_and_gradients(rows: int, dtype: str, num_in: int) -> None:
    shape = (3, 5, 16) if num_in == 1 else (16, 3, 5)
    rng = np.random.default_rng(rows)
    kernel = jnp.asarray(rng.standard_normal(shape), dtype)
    x = jnp.asarray(rng.standard_normal((rows, 1, *shape[-num_in:])), dtype)
    dy = jnp.asarray(rng.standard_normal((rows, 1, *shape[:-num_in])), dtype)

    y, transposed = jax.vjp(lambda kernel, x: project(kernel, x, num_in), kernel, x)
    got = (y, *transposed(dy.astype(y.dtype)))

    exact = np.asarray(kernel, np.float64).reshape(-1, 16 if num_in == 1 else 15)
    flat = np.asarray(x, np.float64).reshape(rows, -1)
    dy_flat = np.asarray(dy, np.float64).reshape(rows, -1)
    want = (flat @ exact.T, dy_flat.T @ flat, dy_flat @ exact)
    assert y.dtype == jnp.float32
    for result, like, reference in zip(got, (dy, kernel, x), want, strict=True):
        assert result.shape == like.shape
        # sums of at most 65 products in float32; gradients are rounded once to their own type
        tolerance = 2e-6 if result.dtype == jnp.float32 else 2**-8
        error = np.linalg.norm(np.asarray(result, np.float64).reshape(reference.shape) - reference)
        assert error <= tolerance * np.linalg.norm(reference)
