"""AWQ against its search written plainly in float64, and a model that folding leaves what it was."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import MoeConfig
from qwen_jax.model import init
from qwen_jax.one_layer import run_layer
from qwen_jax.weights.load import ParamsCheckpoint, get_leaf
from tests.infer import tiny
from tests.train.quantise.test_gptq import inputs, output_error, seen
from train.quantise import awq
from train.quantise.layerwise import Quantiser
from train.quantise.methods import Seen
from train.quantise.stages import Matrices, stages

quantised = jax.jit(awq.clipped, static_argnames="group")


def affine(members: np.ndarray, share: Any) -> np.ndarray:
    """[out, groups, group] in 16 steps between the ends of what is left of the range."""
    largest = share * np.abs(members).max(-1)
    members = np.clip(members, -largest[..., None], largest[..., None])
    low, high = np.minimum(members.min(-1), 0), np.maximum(members.max(-1), 0)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float64)[..., None]
    zero = np.clip(np.round(-low[..., None] / scale), 0, 15)
    return (np.clip(np.round(members / scale) + zero, 0, 15) - zero) * scale


def papers_clip(weight: np.ndarray, x: np.ndarray, group: int) -> np.ndarray:
    """Of each row and group the share of its largest weight that changes its part of the outputs least."""
    members, x = weight.reshape(len(weight), -1, group), x.reshape(len(x), -1, group)
    best, found = np.full(members.shape[:2], np.inf), np.empty_like(members)
    for share in 1 - 0.5 * np.arange(20) / 20:
        rounded = affine(members, share)
        error = np.square(np.einsum("ngi,ogi->nog", x, rounded - members)).sum(0)
        better = error < best
        best, found = np.where(better, error, best), np.where(better[..., None], rounded, found)
    return found.reshape(weight.shape)


def test_the_range_that_loses_least() -> None:
    rng = np.random.default_rng(2)
    weight, x = rng.standard_normal((32, 128)).astype(np.float32), inputs(128, 400)
    found = quantised(jnp.asarray(weight), seen(x), group=32)
    ours = np.asarray(found.astype(jnp.float32).dense(), np.float64)
    wanted = papers_clip(weight.astype(np.float64), x, 32)
    assert (np.abs(ours - wanted) < 1e-5).mean() > 0.99  # of two shares that are as good either may be taken
    assert abs(output_error(ours, weight, x) / output_error(wanted, weight, x) - 1) < 0.005
    plain = affine(weight.reshape(32, -1, 32).astype(np.float64), 1.0).reshape(weight.shape)
    assert output_error(ours, weight, x) < output_error(plain, weight, x)


def test_the_scales_that_lose_least() -> None:
    """The least of the paper's grid and AutoAWQ's, for two matrices with one input."""
    rng = np.random.default_rng(4)
    weights, x = [rng.standard_normal((n, 128)) * np.exp(rng.standard_normal(128)) for n in (24, 40)], inputs(128, 300)
    x[:, :5] *= 30
    ours = np.asarray(
        awq._search(
            (tuple(jnp.asarray(weight, jnp.float32) for weight in weights),), (seen(x),), group=32, repeats=1, heads=1
        ),
        np.float64,
    )

    def loss(scales: np.ndarray) -> float:
        rounded = [affine((w * scales).reshape(len(w), -1, 32), 1.0).reshape(w.shape) / scales for w in weights]
        return sum(float(np.square(x @ (q - w).T).sum()) for q, w in zip(rounded, weights, strict=True))

    of_x = np.abs(x).mean(0) / np.abs(x).mean()
    relative = [np.abs(w).reshape(len(w), -1, 32) for w in weights]
    relative = [(w / (w.max(-1, keepdims=True) + 1e-6)).reshape(len(w), -1) for w in relative]
    of_w = np.concatenate(relative).mean(0)
    losses = []
    for exponent in np.arange(20) / 20:
        for divisor in (1.0, of_w ** (1 - exponent) + 1e-4):
            scales = np.maximum(np.maximum(of_x, 1e-4) ** exponent / divisor, 1e-4)
            losses.append(loss(scales / np.sqrt(scales.max() * scales.min())))
    assert abs(loss(ours) / min(losses) - 1) < 1e-3
    assert loss(ours) < 0.9 * loss(np.ones(128))


WIDE = dataclasses.replace(
    tiny.CONFIG, hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=256,
    initializer_range=0.05,
)  # fmt: skip
CONFIGS = {
    "qwen2": WIDE,
    "qwen3": dataclasses.replace(WIDE, model_type="qwen3"),
    "qwen2_moe": dataclasses.replace(WIDE, model_type="qwen2_moe", moe=MoeConfig(4, 2, 128, 128)),
}


@pytest.mark.parametrize("name", ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in list(CONFIGS)[1:])])
def test_folding_changes_nothing(name: str) -> None:
    """Any scales, in every stage: the layer's outputs stay, and what its matrices meet is what was said."""
    config, rng = dataclasses.replace(CONFIGS[name], num_layers=1), np.random.default_rng(0)
    params = init(config, jax.random.key(0))
    layer = jax.tree.map(lambda leaf: leaf[0] + 0.02, params["layers"])
    x, norm = jnp.asarray(rng.standard_normal((2, 24, 128)), jnp.float32), {"scale": jnp.ones(128)}
    before = run_layer(layer, norm, x, config=config)[0]
    matrices = Matrices(config)
    for stage in stages(config):
        width = matrices.get(layer, stage.groups[0][0]).shape[-1]
        meets = []
        for of_group in stage.groups:
            front = matrices.get(layer, of_group[0]).shape[:-2]
            uneven = jnp.asarray(np.exp(2 * rng.standard_normal((*front, width))), jnp.float32)
            meets.append(Seen(jax.vmap(jnp.diag)(uneven) if front else jnp.diag(uneven), jnp.sqrt(uneven)))
        layer, met, rows = awq.fold(matrices, layer, stage, meets, group=32)
        assert float(jnp.max(jnp.abs(met[0].gram - meets[0].gram))) > 0.1
        if rows is not None:  # what the quantiser does to codes
            assert stage.producer is not None
            layer = matrices.with_matrix(layer, stage.producer, matrices.get(layer, stage.producer) / rows[..., None])
    after = run_layer(layer, norm, x, config=config)[0]
    assert float(jnp.max(jnp.abs(after - before))) < 2e-5 * float(jnp.max(jnp.abs(before)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe"])
def test_a_model_loses_less_than_by_rounding_alone(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(0)
    params = init(config, jax.random.key(0))
    for norm in ("attention_norm", "mlp_norm"):  # some inputs are large, as in trained models
        scale = get_leaf(params, f"layers/{norm}/scale")
        params["layers"][norm]["scale"] = scale.at[:, ::16].set(12.0)
    tokens, held_out = (rng.integers(0, 263, (n, 24)).astype(np.int32) for n in (4, 2))

    def errors(fold: Any) -> dict[str, float]:
        method = functools.partial(awq.clipped, group=32)
        quantiser = Quantiser(ParamsCheckpoint(params, config), method, tokens, held_out, fold=fold)
        list(quantiser.layers())
        assert np.isfinite(quantiser.loss().after)
        return {row.kind: row.relative for row in quantiser.loss().errors}

    alone, folded = errors(None), errors(functools.partial(awq.fold, group=32))
    assert all(folded[kind] < alone[kind] * 1.02 for kind in alone)
    assert folded["attention/q"] < 0.9 * alone["attention/q"]
