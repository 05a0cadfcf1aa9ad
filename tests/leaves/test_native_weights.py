"""Weights packed for the C kernels stand for what they were packed from."""

from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import native as kernels
from qwen_jax.leaves import Blocks, Grouped, Int8, Leaf, Lora, Weight, lookup, matmul, swiglu_mlp
from qwen_jax.leaves.encode import encode
from qwen_jax.leaves.native import Native, pack
from tests.kernels.test_native import gguf_blocks

if reason := kernels.why_not():
    pytest.skip(reason, allow_module_level=True)

RNG = np.random.default_rng(0)


def grouped(dtype: Any, zero: bool, order: bool) -> Grouped:
    low, high = (-8, 8) if dtype == jnp.int4 else (-128, 128)
    codes = [jnp.asarray(RNG.integers(low, high, shape), dtype) for shape in ((32, 4, 64), (32, 4))]
    scale = jnp.asarray(RNG.random((32, 4)), jnp.float16)
    return Grouped(
        codes[0], scale, codes[1] if zero else None, order=jnp.asarray(RNG.permutation(256)) if order else None
    )


DENSE = jnp.asarray(RNG.standard_normal((32, 256)), jnp.float32)
KINDS: dict[str, Any] = {
    **{name: lambda name=name: Blocks(jnp.asarray(gguf_blocks(name, 32, 256, RNG)), name) for name in ("Q5_0", "Q6_K")},
    "int4": lambda: grouped(jnp.int4, zero=False, order=False),
    "int4, zeros, order": lambda: grouped(jnp.int4, zero=True, order=True),
    "int8 groups": lambda: grouped(jnp.int8, zero=True, order=False),
    "Int8": lambda: Int8.quantise(DENSE),
    "Int8 in bfloat16": lambda: Int8.quantise(DENSE.astype(jnp.bfloat16)).astype(jnp.float32),
    "Lora": lambda: Lora.create(Int8.quantise(DENSE), 4, 8.0, jax.random.key(0)).replace(b=jnp.ones((32, 4))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_stands_for_the_same_matrix(kind: str) -> None:
    weight = KINDS[kind]()
    packed: Any = pack(weight)
    assert isinstance(packed.base if isinstance(packed, Lora) else packed, Native)
    dense = np.asarray(weight.dense(), np.float32)
    np.testing.assert_allclose(packed.dense(), dense, rtol=1e-6, atol=1e-6 * np.abs(dense).max())
    ids = jnp.asarray([[3, 31], [0, 32]])
    np.testing.assert_allclose(lookup(packed, ids), lookup(weight, ids), rtol=1e-6, atol=1e-6 * np.abs(dense).max())
    x = RNG.standard_normal((2, 3, 256)).astype(np.float32)
    y = matmul(packed, jnp.asarray(x))
    assert y.shape == (2, 3, 32)
    assert np.linalg.norm(y - x @ dense.T) < 1e-2 * np.linalg.norm(x @ dense.T)


def test_axes_of_heads() -> None:
    heads, x = DENSE.reshape(2, 16, 256), DENSE[:5]
    for weight, num_in, rows in ((heads, 1, x), (DENSE.reshape(32, 8, 32), 2, x.reshape(5, 8, 32))):
        packed: Any = pack(weight, num_in)
        assert packed.shape == weight.shape and packed.dense().shape == weight.shape
        exact = matmul(weight, rows, num_in)
        found = matmul(packed, rows, num_in)
        assert found.shape == exact.shape
        assert np.linalg.norm(found - exact) < 2e-2 * np.linalg.norm(exact)


def test_dense_becomes_q8_0() -> None:
    raw = gguf.quants.quantize(np.asarray(DENSE), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(encode(np.asarray(DENSE), "Q8_0"), raw)
    packed: Any = pack(DENSE.astype(jnp.bfloat16))
    assert packed.format == "Q8_0" and packed.dtype == jnp.float32


@pytest.mark.parametrize(
    "weight",
    [
        jnp.ones((24, 256)),
        jnp.ones((32, 40)),
        Int8(jnp.ones((32, 64), jnp.float8_e4m3fn), jnp.ones(32)),
        Blocks(jnp.zeros((32, 1, 84), jnp.uint8), "Q2_K"),
        Grouped(jnp.zeros((32, 4, 16), jnp.int4), jnp.ones((32, 4))),
        Grouped(jnp.zeros((32, 4, 32), jnp.int4), jnp.ones((32, 4)), codebook=tuple(map(float, range(16)))),
    ],
)
def test_what_has_no_form_stays(weight: Leaf) -> None:
    assert pack(weight) is weight


def test_mlp_is_one_call() -> None:
    gate, up, down = (pack(jnp.asarray(RNG.standard_normal(s), jnp.float32)) for s in ((96, 64), (96, 64), (64, 96)))
    x = jnp.asarray(RNG.standard_normal((2, 3, 64)), jnp.float32)
    assert isinstance(gate, Weight) and isinstance(up, Weight) and isinstance(down, Weight)
    exact = swiglu_mlp(gate.dense(), up.dense(), down.dense(), x)
    found = swiglu_mlp(gate, up, down, x)
    assert np.linalg.norm(found - exact) < 3e-2 * np.linalg.norm(exact)
    assert str(jax.make_jaxpr(swiglu_mlp)(gate, up, down, x)).count("ffi_call") == 1
