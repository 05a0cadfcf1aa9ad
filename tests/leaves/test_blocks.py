"""GGUF's blocks as weights: decoded bit for bit as by the gguf package, and multiplied as what they decode to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.backend import Backend
from qwen_jax.leaves import Blocks, grouped_matmul, groupwise, lookup, matmul
from qwen_jax.leaves.blocks import FORMATS

gguf = pytest.importorskip("gguf")


def random_blocks(name: str, *shape: int) -> np.ndarray:
    """Blocks [*shape, block_bytes] whose scales are finite, as the gguf package has them in its tests."""
    fmt, rng = FORMATS[name], np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*shape, fmt.block_bytes), np.uint8)
    halves = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2]}
    for at in halves.get(name, [208] if name == "Q6_K" else [0]):
        values = rng.standard_normal((*shape, 1)).astype(np.float16)
        blocks[..., at : at + 2] = values.view(np.uint8)
    return blocks


def decoded(blocks: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks.reshape(-1, blocks.shape[-1]), gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_bit_for_bit(name: str) -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (3000, FORMATS[name].block_bytes), np.uint8)
    expected = decoded(blocks, name)
    ours = np.asarray(jax.jit(FORMATS[name].decode)(blocks))
    # any bytes: scales that are no numbers too, of which only the sign of a NaN may differ
    assert np.array_equal(np.isnan(ours), np.isnan(expected))
    assert np.array_equal(ours.view(np.uint32)[~np.isnan(ours)], expected.view(np.uint32)[~np.isnan(ours)])
    assert np.isfinite(expected).mean() > 0.9


@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(name, 48, 2)
    weight = Blocks(jnp.asarray(blocks), name)
    dense = decoded(blocks, name).reshape(48, -1).astype(np.float64)
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((3, dense.shape[1])), rng.standard_normal((3, 48))
    monkeypatch.setattr(groupwise, "STRIP", 16 * dense.shape[1])  # three strips

    def close(found: Any, wanted: np.ndarray) -> None:
        assert np.linalg.norm(np.asarray(found, np.float64) - wanted) <= 1e-6 * np.linalg.norm(wanted)

    y, transposed = jax.vjp(lambda x: matmul(weight, x), jnp.asarray(x, jnp.float32))
    close(y, x @ dense.T)
    close(transposed(jnp.asarray(dy, jnp.float32))[0], dy @ dense)
    close(lookup(weight, jnp.asarray([[0, 47], [9, 48]])), np.concatenate([dense, 0 * dense[:1]])[[[0, 47], [9, 48]]])

    experts = Blocks(jnp.asarray(blocks.reshape(3, 16, 2, -1)), name)
    rows = rng.standard_normal((9, dense.shape[1]))
    chosen = dense.reshape(3, 16, -1)[np.repeat(np.arange(3), [2, 0, 7])]
    sizes = jnp.asarray([2, 0, 7])
    y, transposed = jax.vjp(lambda rows: grouped_matmul(experts, rows, sizes), jnp.asarray(rows, jnp.float32))
    close(y, np.einsum("roi,ri->ro", chosen, rows))
    dy = rng.standard_normal((9, 16))
    close(transposed(jnp.asarray(dy, jnp.float32))[0], np.einsum("roi,ro->ri", chosen, dy))


def test_an_input_of_two_axes() -> None:
    blocks = random_blocks("Q8_0", 6, 4)
    weight = Blocks(jnp.asarray(blocks), "Q8_0", inner=(16,), float_dtype=jnp.dtype(jnp.bfloat16))
    assert (weight.shape, weight.dtype) == ((6, 8, 16), jnp.bfloat16)
    assert weight.dense().shape == weight.shape
    assert weight.axes((None, "heads", "head_dim")) == [(None, "heads", None)]
    x = np.random.default_rng(0).standard_normal((2, 8, 16)).astype(np.float32)
    with Backend("tpu").entered():
        y = matmul(weight, jnp.asarray(x), 2)
    np.testing.assert_allclose(y, x.reshape(2, -1) @ decoded(blocks, "Q8_0").reshape(6, -1).T, rtol=1e-4, atol=1e-4)
