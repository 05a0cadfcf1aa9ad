"""The feed-forward, whole and in parts, against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.qwen import Qwen
from qwen_jax.backend import current_backend
from qwen_jax.layers.mlp import PART, Mlp, in_parts
from qwen_jax.model import init
from tests.infer import tiny


@pytest.mark.parametrize("features", [96, PART, 2 * PART + 8])
@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_parts_is_the_whole(features: int, tokens: int, dtype: str) -> None:
    rng = np.random.default_rng(features + tokens)
    shapes = {"gate": (features, 64), "up": (features, 64), "down": (64, features)}
    kernels = {n: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[1]), dtype) for n, s in shapes.items()}
    x = jnp.asarray(3 * rng.standard_normal((1, tokens, 64)), dtype)  # gates of up to 12

    whole = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    parts = in_parts(whole)
    assert len(parts["parts"]) == -(-features // PART)

    wide = {name: np.asarray(kernel, np.float64) for name, kernel in kernels.items()}
    rows = np.asarray(x, np.float64)
    gate = rows @ wide["gate"].T
    exact = (gate / (1 + np.exp(-gate)) * (rows @ wide["up"].T)) @ wide["down"].T
    # float32 sums of up to 3336 products; in bfloat16 two roundings of 2^-9, of the hidden features and of the result
    limit = 2e-6 if dtype == "float32" else 2**-8
    found = Mlp(64, features).apply({"params": parts}, x)
    assert isinstance(found, jax.Array) and found.dtype == x.dtype
    assert np.linalg.norm(np.asarray(found, np.float64) - exact) <= limit * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_is_served_in_parts_where_that_is_faster(dtype: str) -> None:
    params = init(tiny.CONFIG, jax.random.key(0), jnp.dtype(dtype))
    served = Qwen(tiny.CONFIG, params, tiny.tokenizer()).params["layers"]
    wanted = dtype == "bfloat16" and current_backend().mlp_in_parts
    assert all(set(layer["mlp"]) == ({"parts"} if wanted else {"gate", "up", "down"}) for layer in served)
