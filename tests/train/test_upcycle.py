"""Experts made of a dense model: what they are cut from, what is drawn anew, and that transformers runs the result."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax.config import MoeConfig
from qwen_jax.errors import InputError
from qwen_jax.model import Inputs, forward, unembed
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint, flatten, load_params
from qwen_jax.weights.open import open_checkpoint
from tests.train.tiny import CONFIG, MOE, parameters
from train.upcycle import UpcycledCheckpoint, main

DENSE = dataclasses.replace(CONFIG, num_layers=2)  # feed-forward width 48


def upcycled(moe: MoeConfig, drawn_anew: float, seed: int = 0):
    base = ParamsCheckpoint(parameters(DENSE), DENSE)
    checkpoint = UpcycledCheckpoint(base, moe, drawn_anew, seed)
    return dict(flatten(load_params(checkpoint, np.float32, progress=False))), dict(flatten(parameters(DENSE)))


def swiglu(x, gate, up, down):
    hidden = x @ gate.T
    return (hidden / (1 + np.exp(-hidden)) * (x @ up.T)) @ down.T


def test_experts_of_one_copy_sum_to_the_dense_feed_forward():
    """Cut but not drawn anew, 6 experts of 8 units are the 48 units in another order."""
    params, dense = upcycled(MoeConfig(6, 2, 8), 0.0)
    x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    for layer in range(2):
        expected = swiglu(x, *(np.asarray(dense[f"layers/mlp/{n}/kernel"])[layer] for n in ("gate", "up", "down")))
        total = sum(
            swiglu(x, *(np.asarray(params[f"layers/moe/experts/{n}"])[layer, e] for n in ("gate", "up", "down")))
            for e in range(6)
        )
        np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-6)


def test_copies_are_shuffled_apart_and_the_remainder_dropped():
    params, dense = upcycled(MoeConfig(10, 2, 8, shared_intermediate_size=20), 0.0)  # 100 units of 3 x 48
    for layer in range(2):
        gates = np.asarray(params["layers/moe/experts/gate"])[layer].reshape(80, 32)
        gates = np.concatenate([gates, np.asarray(params["layers/moe/shared/gate/kernel"])[layer]])
        rows = np.asarray(dense["layers/mlp/gate/kernel"])[layer]
        units = [int(np.flatnonzero((rows == gate).all(1))[0]) for gate in gates]
        assert sorted(units[:48]) == sorted(units[48:96]) == list(range(48))
        assert units[:48] != units[48:96] and units[:48] != list(range(48))
    assert not np.array_equal(params["layers/moe/router/kernel"][0], params["layers/moe/router/kernel"][1])


def test_half_of_each_expert_is_drawn_anew():
    moe = MoeConfig(6, 2, 8, shared_intermediate_size=16)
    kept, _ = upcycled(moe, 0.0)
    params, dense = upcycled(moe, 0.5)
    again, _ = upcycled(moe, 0.5)
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, again[path])
        if "/experts/" in path or "/shared/" in path:
            new = np.asarray(leaf != kept[path])
            axes = tuple(range(2, new.ndim)) if "/experts/" in path else (1, 2)
            assert np.all(np.abs(new.mean(axes) - 0.5) < 0.12)
            assert np.std(np.asarray(leaf)[new]) == pytest.approx(0.02, rel=0.1)
        elif "/moe/" not in path:
            np.testing.assert_array_equal(leaf, dense[path])


def test_transformers_runs_what_the_command_writes(tmp_path):
    import torch
    import transformers

    save_hf(ParamsCheckpoint(parameters(DENSE), DENSE), tmp_path / "dense", progress=False)
    sizes = "--experts 8 --top-k 2 --expert-size 24 --shared-size 32 --dtype float32".split()
    assert main([str(tmp_path / "dense"), str(tmp_path / "moe"), *sizes]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    checkpoint = open_checkpoint(tmp_path / "moe")
    assert checkpoint.config.moe == dataclasses.replace(MOE.moe, aux_loss_coef=0.001)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 32))
    params = load_params(checkpoint, np.float32, progress=False)
    hidden = jax.jit(
        lambda p, t: unembed(checkpoint.config, p, forward(checkpoint.config, p, Inputs.training(t)).hidden)
    )
    expected = model(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(hidden(params, tokens), expected, atol=1e-5)


def test_a_mixture_cannot_be_upcycled():
    with pytest.raises(InputError, match="only dense"):
        UpcycledCheckpoint(ParamsCheckpoint(parameters(MOE), MOE), MoeConfig(4, 2, 8))
