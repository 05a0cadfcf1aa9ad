"""The feed-forward, as layers train it and as it is served, against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.prepare import prepare
from qwen_jax.backend import Backend
from qwen_jax.kernels.cpu import PART
from qwen_jax.layers.mlp import Mlp
from qwen_jax.unstacked import Unstacked


@pytest.mark.parametrize("features", [96, 2 * PART + 8])
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["cpu", "gpu"])
def test_is_its_formula(features: int, tokens: int, dtype: str, kernels: str) -> None:
    rng = np.random.default_rng(features + tokens)
    shapes = {"gate": (features, 64), "up": (features, 64), "down": (64, features)}
    weights = {n: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[1]), dtype) for n, s in shapes.items()}
    x = jnp.asarray(3 * rng.standard_normal((1, tokens, 64)), dtype)  # gates of up to 12

    layer = {"mlp": {name: {"kernel": weight} for name, weight in weights.items()}}
    served = prepare({"layers": Unstacked([layer])}, Backend(kernels))["layers"][0]["mlp"]  # type: ignore[arg-type]
    if kernels == "cpu":
        assert len(served["gate"]["kernel"].parts) == (1 if dtype == "float32" else -(-features // PART))

    wide = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    rows = np.asarray(x, np.float64)
    gate = rows @ wide["gate"].T
    exact = (gate / (1 + np.exp(-gate)) * (rows @ wide["up"].T)) @ wide["down"].T
    # float32 sums of up to 3336 products; in bfloat16 roundings of 2^-9, of gate, up, hidden features and result
    limit = 2e-6 if dtype == "float32" else 2**-8
    found = Mlp(64, features).apply({"params": served}, x)
    assert isinstance(found, jax.Array) and found.dtype == x.dtype
    assert np.linalg.norm(np.asarray(found, np.float64) - exact) <= limit * np.linalg.norm(exact)
