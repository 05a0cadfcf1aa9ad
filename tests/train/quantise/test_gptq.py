"""GPTQ against its paper's algorithm, written plainly in float64, and against rounding to the nearest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.quantise.gptq import gptq
from train.quantise.methods import Seen


def inputs(num_in: int, num_rows: int, seed: int = 0) -> np.ndarray:
    """Correlated inputs of very different sizes, as a network's are; the last is always 0."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((num_rows, num_in)) @ (
        rng.standard_normal((num_in, num_in)) / num_in**0.5 + np.eye(num_in)
    )
    x = mixed * np.exp(rng.standard_normal(num_in))
    x[:, -1] = 0
    return x


def papers_algorithm(
    weight: np.ndarray, x: np.ndarray, bits: int, group: int, order: np.ndarray, damping: float
) -> np.ndarray:
    """Algorithm 1 one column at a time, float64: the dequantised weight."""
    hessian = x.T @ x
    dead = np.diag(hessian) == 0
    mean = np.diag(hessian).mean()
    hessian[np.diag_indices(len(hessian))] += np.where(dead, mean, damping * mean)
    factor = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T
    w, most = weight[:, order].copy(), 2 ** (bits - 1)
    out = np.empty_like(w)
    for i in range(w.shape[1]):
        if i % group == 0:
            scale = (np.abs(w[:, i : i + group]).max(1) / (most - 0.5)).astype(np.float16).astype(np.float64)
        out[:, i] = np.clip(np.round(w[:, i] / scale), -most, most - 1) * scale
        w[:, i:] -= np.outer((w[:, i] - out[:, i]) / factor[i, i], factor[i, i:])
    back = np.empty_like(out)
    back[:, order] = out
    return back


quantised = jax.jit(gptq, static_argnames=("bits", "group", "act_order"))


def seen(x: np.ndarray) -> Seen:
    return Seen(jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(np.abs(x).sum(0), jnp.float32))


def output_error(found: np.ndarray, weight: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(x @ (found - weight).T) / np.linalg.norm(x @ weight.T))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("num_in", "group"), [(256, 128), (192, 64), (128, 32)])
def test_it_is_the_papers_algorithm(bits: int, act_order: bool, num_in: int, group: int) -> None:
    rng = np.random.default_rng(3)
    weight, x = rng.standard_normal((48, num_in)).astype(np.float32), inputs(num_in, 600)
    found = quantised(jnp.asarray(weight), seen(x), bits=bits, group=group, act_order=act_order)
    dense = np.asarray(found.astype(jnp.float32).dense(), np.float64)
    energy = np.diag(x.T @ x)
    if act_order:
        order = np.argsort(-energy, kind="stable")
        assert found.order is not None
    else:
        groups = np.argsort(-energy.reshape(-1, group).max(1), kind="stable")
        order = np.concatenate(
            [g * group + np.argsort(-energy[g * group : (g + 1) * group], kind="stable") for g in groups]
        )
        assert found.order is None
    wanted = papers_algorithm(weight.astype(np.float64), x, bits, group, order, 0.01)
    # a code on the edge may fall to its neighbour, and change those after it
    assert (np.abs(dense - wanted) < 1e-3 * np.abs(wanted).max()).mean() > 0.97
    ours, theirs = output_error(dense, weight, x), output_error(wanted, weight, x)
    assert abs(ours / theirs - 1) < 0.01
    assert found.scale.dtype == np.float16


def nearest(weight: np.ndarray, group: int) -> np.ndarray:
    members = weight.reshape(len(weight), -1, group)
    scale = np.abs(members).max(-1, keepdims=True) / 7.5
    return (np.clip(np.round(members / scale), -8, 7) * scale).reshape(weight.shape)


def test_it_loses_less_than_rounding_to_the_nearest() -> None:
    rng = np.random.default_rng(5)
    weight, x = rng.standard_normal((64, 256)), inputs(256, 1000)
    errors: dict[Any, float] = {"nearest": output_error(nearest(weight, 128), weight, x)}
    for act_order in (False, True):
        found = quantised(jnp.asarray(weight, jnp.float32), seen(x), bits=4, group=128, act_order=act_order)
        errors[act_order] = output_error(np.asarray(found.astype(jnp.float32).dense()), weight, x)
    assert errors[True] < 0.75 * errors["nearest"] and errors[False] < 0.75 * errors["nearest"]


def test_weights_and_inputs_of_zero() -> None:
    found = quantised(jnp.zeros((8, 64)), Seen(jnp.zeros((64, 64)), jnp.zeros(64)), bits=4, group=32)
    assert (np.asarray(found.astype(jnp.float32).dense()) == 0).all()
    weight = jnp.ones((8, 64))  # never multiplied by anything: the nearest
    found = quantised(weight, Seen(jnp.zeros((64, 64)), jnp.zeros(64)), bits=4, group=32)
    np.testing.assert_allclose(found.astype(jnp.float32).dense(), 1, atol=0.08)
