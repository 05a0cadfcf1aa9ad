"""Int8, grouped and LoRA weights against PyTorch with the dense weight that they stand for, alone and in a model."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from infer.prepare import prepare
from qwen_jax.backend import Backend
from qwen_jax.config import MoeConfig
from qwen_jax.leaves import Grouped, Int8, Leaf, Lora, Weight, grouped_matmul, lookup, map_arrays, matmul
from qwen_jax.model import Inputs, Params, forward, init, logical_axes, unembed
from qwen_jax.sharding import RULES, MeshConfig, make_mesh
from tests.infer import tiny

CONFIG = dataclasses.replace(
    tiny.CONFIG,
    model_type="qwen2_moe",
    num_layers=1,
    tie_word_embeddings=True,
    moe=MoeConfig(num_experts=4, top_k=2, expert_intermediate_size=16, shared_intermediate_size=32),
)


def make(kind: str, dense: jax.Array, num_in: int = 1, num_front: int = 0) -> Leaf:
    """A weight of that kind near `dense`, with LoRA's b not 0."""
    if kind == "int8":
        return Int8.quantise(dense, num_in)
    if kind in ("grouped", "ordered", "nf4"):
        return grouped(kind, dense, num_in, num_front)
    base = Int8.quantise(dense, num_in) if kind == "lora on int8" else dense
    if kind == "lora on grouped":
        base = grouped("grouped", dense, num_in, num_front)
    lora = Lora.create(base, 4, 8.0, jax.random.key(3, impl="unsafe_rbg"), num_in=num_in, num_front=num_front)
    return lora.replace(b=0.1 * jnp.sin(jnp.arange(lora.b.size, dtype=jnp.float32)).reshape(lora.b.shape))


def grouped(kind: str, dense: jax.Array, num_in: int, num_front: int) -> Grouped:
    """4 bits with a scale, and but for nf4 a zero, for each 8 inputs, which may lie in another order."""
    inner, width = dense.shape[dense.ndim - num_in + 1 :], math.prod(dense.shape[dense.ndim - num_in :])
    codes = dense.reshape(*dense.shape[: dense.ndim - num_in], width)
    order = None
    if kind == "ordered":
        order = jnp.broadcast_to(jnp.arange(width)[::-1] ^ 1, (*dense.shape[:num_front], width))
        codes = codes[..., order.reshape(-1, width)[0]]
    codes = codes.reshape(*codes.shape[:-1], -1, 8)
    low, high = jnp.min(codes, -1), jnp.max(codes, -1)
    scale = ((high - low) / 15).astype(jnp.float16)
    zero = jnp.round(-low / scale.astype(jnp.float32)) - 8
    values = jnp.clip(jnp.round(codes / scale[..., None].astype(jnp.float32)) + zero[..., None], -8, 7)
    zero = None if kind == "nf4" else zero.astype(jnp.int4)
    codebook = tuple(np.linspace(-1, 1, 16) ** 3) if kind == "nf4" else None
    return Grouped(
        values.astype(jnp.int4), scale, zero, codebook=codebook, order=order, inner=inner, float_dtype=dense.dtype
    )


def stands_for(weight: Leaf, num_front: int = 0) -> np.ndarray:
    """The weight's formula in float64."""
    if isinstance(weight, Int8):
        scale = np.asarray(weight.scale, np.float64)
        return np.asarray(weight.values, np.float64) * scale.reshape(*scale.shape, *[1] * (weight.ndim - scale.ndim))
    if isinstance(weight, Grouped):
        numbers = np.asarray(weight.values).astype(np.int32)
        numbers = numbers if weight.codebook is None else np.asarray(weight.codebook, np.float32)[numbers + 8]
        zero = 0 if weight.zero is None else np.asarray(weight.zero).astype(np.float64)[..., None]
        flat = (numbers - zero) * np.asarray(weight.scale, np.float64)[..., None]
        flat = flat.reshape(*flat.shape[:-2], -1)
        if weight.order is not None:
            back = np.empty_like(flat)
            back[..., np.asarray(weight.order).reshape(-1, flat.shape[-1])[0]] = flat
            flat = back
        return flat.reshape(weight.shape)
    if isinstance(weight, Lora):
        a, b = np.asarray(weight.a, np.float64), np.asarray(weight.b, np.float64)
        flat_a, flat_b = (x.reshape(-1, *x.shape[num_front:]) for x in (a, b))
        added = np.stack([np.tensordot(y, x, 1) for x, y in zip(flat_a, flat_b, strict=True)]).reshape(weight.shape)
        return stands_for(weight.base, num_front) + weight.scaling * added
    return np.asarray(weight, np.float64)


def close(found: Any, wanted: Any, limit: float) -> None:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= limit * np.linalg.norm(wanted)


KINDS = ["int8", "grouped", "ordered", "nf4", "lora", "lora on int8", "lora on grouped"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_in", [1, 2])
@pytest.mark.parametrize("kernels", ["cpu", "tpu"])
def test_products_are_those_of_the_dense_weight(kind: str, num_in: int, kernels: Any) -> None:
    rng = np.random.default_rng(num_in)
    weight = make(kind, jnp.asarray(rng.standard_normal((6, 5, 16)), jnp.float32), num_in)
    x = jnp.asarray(rng.standard_normal((3, *weight.shape[-num_in:])), jnp.float32)
    dense = torch.tensor(stands_for(weight))
    flat, rows = dense.reshape(-1, x[0].size), torch.tensor(np.asarray(x, np.float64)).reshape(3, -1)
    rows.requires_grad_()
    expected = rows @ flat.T
    dy = rng.standard_normal(expected.shape)
    expected.backward(torch.tensor(dy))

    close(weight.dense(), dense, 1e-6)
    with Backend(kernels).entered():
        y, transposed = jax.vjp(lambda x: matmul(weight, x, num_in), x)
    close(y.reshape(3, -1), expected.detach(), 1e-6)
    (dx,) = transposed(jnp.asarray(dy, jnp.float32).reshape(y.shape))
    assert rows.grad is not None
    close(dx.reshape(3, -1), rows.grad, 1e-6)
    # the error of quantising is at most half a step of each channel
    if isinstance(weight, Int8):
        again = Int8.quantise(jnp.asarray(weight.dense()), num_in)
        np.testing.assert_array_equal(again.values, weight.values)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table(kind: str) -> None:
    table = make(kind, jax.random.normal(jax.random.key(0), (10, 8)))
    dense = np.concatenate([stands_for(table), np.zeros((1, 8))])
    ids = np.array([[0, 9], [3, 10]])  # 10 is none of the rows
    close(lookup(table, jnp.asarray(ids)), dense[ids], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_experts(kind: str) -> None:
    weight = make(kind, jax.random.normal(jax.random.key(0), (3, 8, 16)), num_front=1)
    rows, sizes = jax.random.normal(jax.random.key(1), (9, 16)), [2, 0, 7]
    dense = stands_for(weight, 1)[np.repeat(np.arange(3), sizes)]
    wanted = np.einsum("roi,ri->ro", dense, np.asarray(rows, np.float64))
    close(grouped_matmul(weight, rows, jnp.asarray(sizes)), wanted, 1e-6)
    close(weight.dense(), stands_for(weight, 1), 1e-6)


def test_a_frozen_base_gets_no_gradient_and_no_product() -> None:
    """LoRA's gradients are dy^T x's through the other factor, times the scaling; the base's product is left out."""
    rng = np.random.default_rng(0)
    base, x, dy = (rng.standard_normal(shape) for shape in ((64, 48), (32, 48), (32, 64)))
    lora = make("lora", jnp.asarray(base, jnp.float32))
    assert isinstance(lora, Lora)

    def product(adapter: tuple[jax.Array, jax.Array], base: Leaf) -> jax.Array:
        weight = lora.replace(base=base, a=adapter[0], b=adapter[1])
        return jnp.sum(matmul(weight, jnp.asarray(x, jnp.float32)) * jnp.asarray(dy, jnp.float32))

    gradient = jax.jit(jax.grad(product))
    d_a, d_b = gradient((lora.a, lora.b), lora.base)
    a, b = np.asarray(lora.a, np.float64), np.asarray(lora.b, np.float64)
    close(d_a, lora.scaling * (dy @ b).T @ x, 1e-5)
    close(d_b, lora.scaling * dy.T @ (x @ a.T), 1e-5)
    cost = gradient.lower((lora.a, lora.b), lora.base).compile().cost_analysis()
    assert cost is not None and cost["flops"] < 2 * 32 * 64 * 48  # one product with the base would be as many
    over_int8 = jax.grad(product)((lora.a, lora.b), Int8.quantise(lora.base))
    close(over_int8[1], lora.scaling * dy.T @ (x @ a.T), 1e-5)


# --- in a model -------------------------------------------------------------------------------------------------------


def adapted(kind: str, params: Params) -> Params:
    """Every matrix of the stacked parameters but the router as a weight of that kind."""

    def of(path: Any, leaf: jax.Array) -> Leaf:
        names = [key.key for key in path]
        front = ("layers" in names) + ("experts" in names)
        if names[-1] in ("scale", "bias") or "router" in names:
            return leaf
        return make(kind, leaf, 2 if names[-2] == "o" else 1, front)

    return jax.tree_util.tree_map_with_path(of, params)


def dense_of(params: Params) -> Params:
    return jax.tree.map(
        lambda leaf: leaf.dense() if isinstance(leaf, Weight) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )


@functools.partial(jax.jit, static_argnums=0)
def logits(config: Any, params: Params, tokens: jax.Array) -> jax.Array:
    return unembed(config, params, forward(config, params, Inputs.training(tokens)).hidden)


@pytest.mark.parametrize("kind", ["lora on int8", "lora on grouped"])
def test_a_model_stacked_prepared_and_on_a_mesh(kind: str) -> None:
    params = jax.jit(lambda key: adapted(kind, init(CONFIG, key)))(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 263, (4, 8)), jnp.int32)
    wanted = logits(CONFIG, jax.jit(dense_of)(params), tokens)
    close(logits(CONFIG, params, tokens), wanted, 1e-5)
    prepared = jax.jit(lambda params: prepare(params, Backend("cpu")))(params)
    close(logits(CONFIG, prepared, tokens), wanted, 1e-5)

    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2), model=CONFIG)

    def place(leaf: Leaf, names: Any) -> Any:
        names = [*names, *[None] * (leaf.ndim - len(names))]
        return map_arrays(
            lambda array, axes: jax.device_put(array, jax.NamedSharding(mesh, RULES.spec(axes))), leaf, names
        )

    axes = logical_axes(CONFIG)
    placed = jax.tree.map(place, params, axes, is_leaf=lambda leaf: isinstance(leaf, Weight))
    with jax.set_mesh(mesh):
        close(logits(CONFIG, placed, tokens), wanted, 1e-5)


def test_a_weight_of_another_shape_is_refused() -> None:
    params = jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))
    params["embed"]["embedding"] = Int8.quantise(jnp.zeros((7, 32)))
    with pytest.raises(Exception, match=r"embedding stands for \(7, 32\), but the configuration says \(320, 32\)"):
        logits(CONFIG, params, jnp.zeros((1, 1), jnp.int32))
