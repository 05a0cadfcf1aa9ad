"""W8A8: products of int8 weights with activations that are rounded to int8 a token at a time, and a model of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.qwen import Qwen
from infer.sampling import Sampling
from qwen_jax.backend import Backend, current_backend
from qwen_jax.leaves import Int8, Weight, matmul
from qwen_jax.model import init
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.infer import tiny

BACKEND = dataclasses.replace(current_backend(), integer_products=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("out", "num_in"), [((24,), 1), ((3, 8), 1), ((24,), 2)])
def test_the_formula(out: tuple[int, ...], num_in: int, dtype: str) -> None:
    """In integers of 64 bits, which is exact, and float64: one row is zeros, one has an outlier."""
    rng = np.random.default_rng(0)
    inner = (64,) if num_in == 1 else (8, 8)
    weight = Int8(
        jnp.asarray(rng.integers(-127, 128, (*out, *inner)), jnp.int8), jnp.asarray(rng.random(out), "float16")
    )
    x = rng.normal(size=(2, 5, *inner)).astype(np.float32)
    x[0, 1], x[1, 2].flat[7] = 0, 300
    x = np.array(jnp.asarray(x, dtype).astype(jnp.float32))
    rows = x.reshape(10, 64)
    step = np.abs(rows).max(1, keepdims=True) / np.float32(127)
    steps = rows / np.where(step == 0, 1, step)
    rows[np.abs(steps % 1 - 0.5) < 1e-4] = 0  # what lies halfway may be rounded either way
    codes = np.round(rows / np.where(step == 0, 1, step)).astype(np.int64)
    product = codes @ np.asarray(weight.values).reshape(-1, 64).astype(np.int64).T
    expected = product * step.astype(np.float64) * np.asarray(weight.scale, np.float64).reshape(-1)
    with BACKEND.entered():
        hlo = jax.jit(lambda w, x: matmul(w, x, num_in)).lower(weight, jnp.asarray(x, dtype))
        found = hlo.compile()(weight, jnp.asarray(x, dtype))
    assert "xi8>" in hlo.as_text() and "xi32>" in hlo.as_text()
    np.testing.assert_allclose(found.reshape(10, -1), expected, rtol=1e-6, atol=1e-6)
    exact = matmul(weight, jnp.asarray(x, dtype), num_in)
    assert 1e-4 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.02


def test_float8_is_not_rounded() -> None:
    weight = Int8(jnp.ones((4, 8), jnp.float8_e4m3fn), jnp.ones(4))
    x = jnp.linspace(0.1, 0.7, 8)[None]
    with BACKEND.entered():
        np.testing.assert_array_equal(matmul(weight, x), matmul(weight.dense(), x))


@pytest.mark.parametrize("mesh", [None, "tensor=2"])
def test_a_model(mesh: str | None) -> None:
    """Its projections become int8, and its answers are near those with the same weights and exact activations."""
    on_mesh = None if mesh is None else make_mesh(MeshConfig.parse(mesh), jax.devices()[:2], model=tiny.CONFIG)
    params = init(tiny.CONFIG, jax.random.key(0))
    model = Qwen(tiny.CONFIG, params, tiny.tokenizer(), mesh=on_mesh, backend=BACKEND)
    leaves = jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    assert sum(isinstance(leaf, Int8) for leaf in leaves) == 7 * tiny.CONFIG.num_layers
    exact = Qwen(tiny.CONFIG, model.params, tiny.tokenizer(), mesh=on_mesh, backend=Backend.of(params))
    answers = [qwen.generate([[5, 6, 7, 8]], Sampling(), max_tokens=1)[0] for qwen in (model, exact)]
    assert 0 < abs(answers[0].logprobs[0] - answers[1].logprobs[0]) < 0.05
