"""Our optimiser against torch.optim.AdamW, transformers' schedules and closed forms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from qwen_jax.errors import InputError
from train.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    load,
    make_optimizer,
    merge_frozen,
    split_frozen,
    store,
)

SHAPES = {"embed": {"embedding": (12, 6)}, "layers": {"mlp": {"kernel": (3, 5, 6)}, "norm": {"scale": (3, 6)}}}
PLAIN = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0)


def tree(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.standard_normal(shape)).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(config: OptimizerConfig, steps: int, scale: float):
    optimizer = make_optimizer(config, steps)
    params = jax.tree.map(jnp.asarray, tree(0))
    state = optimizer.init(params)
    history = []
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(tree(step + 1, scale), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        history.append(params)
    return history


@pytest.mark.parametrize("scale", [0.01, 3.0], ids=["below the clip", "clipped"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_step_equals_torch_adamw(scale, schedule):
    steps = 25
    config = dataclasses.replace(PLAIN, schedule=schedule, warmup_steps=5)
    leaves, treedef = jax.tree.flatten(tree(0))
    tensors = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in leaves]
    embedding, kernel, norm = tensors
    groups = [{"params": [embedding, kernel], "weight_decay": 0.1}, {"params": [norm], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    rates = learning_rate_schedule(config, steps)
    for step, ours in enumerate(run(config, steps, scale)):
        for tensor, gradient in zip(tensors, jax.tree.leaves(tree(step + 1, scale)), strict=True):
            tensor.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = float(rates(step))
        optimizer.step()
        for mine, tensor in zip(treedef.flatten_up_to(ours), tensors, strict=True):
            np.testing.assert_allclose(mine, tensor.detach().numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules_equal_transformers(warmup):
    total = 50
    for ours, theirs, extra in (
        ("constant", "constant_with_warmup", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ):
        config = OptimizerConfig(1e-3, ours, warmup, final_fraction=0.0 if ours == "linear" else 0.1)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        steps = {} if ours == "constant" else {"num_training_steps": total}
        scheduler = transformers.get_scheduler(
            theirs, optimizer, num_warmup_steps=warmup, scheduler_specific_kwargs=extra, **steps
        )
        rates = learning_rate_schedule(config, total)
        for step in range(total):
            np.testing.assert_allclose(rates(step), scheduler.get_last_lr()[0], rtol=1e-5, atol=1e-10)
            optimizer.step()
            scheduler.step()


def test_wsd_rises_stays_and_falls():
    rates = learning_rate_schedule(OptimizerConfig(1.0, "wsd", 10, decay_fraction=0.2), 100)
    np.testing.assert_allclose([rates(step) for step in (0, 5, 10, 50, 80, 90)], [0, 0.5, 1, 1, 1, 0.55], atol=1e-6)


def test_bfloat16_moments_take_half_and_stay_close():
    reference = run(PLAIN, 20, 0.1)[-1]
    ours = run(dataclasses.replace(PLAIN, moments="bfloat16"), 20, 0.1)[-1]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), reference, tree(0))
    for a, b, m in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), jax.tree.leaves(moved), strict=True):
        assert np.abs(a - b).max() < 0.02 * m
    state = make_optimizer(dataclasses.replace(PLAIN, moments="bfloat16"), 1).init(tree(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {"bfloat16"}


def test_int8_codes_are_exact_to_a_step_and_unbiased_over_time():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 32)) * 10.0 ** rng.uniform(-3, 0, (64, 32)), jnp.float32)
    for signed, value, step, octaves in ((True, x, 2 ** (1 / 9), 13), (False, x * x, 2 ** (1 / 8), 31)):
        decoded = np.stack([load(store(value, "int8", signed, jnp.asarray(count))) for count in range(256)])
        in_range = np.abs(value) > np.abs(value).max(-1, keepdims=True) / 2.0**octaves
        ratio = (decoded / np.asarray(value))[:, in_range]
        assert in_range.mean() > 0.98
        assert ratio.min() >= 1 / step - 1e-3 and ratio.max() <= step + 1e-3
        np.testing.assert_allclose(ratio.mean(0), 1.0, atol=5e-3)
    zeros = store(jnp.zeros((3, 4)), "int8", True, jnp.asarray(0))
    assert zeros.code.dtype == jnp.int8 and not np.any(load(zeros))


def test_int8_moments_train_as_float32_ones():
    """A noisy quadratic: both end where the other does."""
    target = jnp.asarray(np.random.default_rng(3).standard_normal((16, 16)), jnp.float32)

    def final_loss(moments: str) -> float:
        config = dataclasses.replace(PLAIN, moments=moments, weight_decay=0.0, schedule="cosine")
        optimizer = make_optimizer(config, 400)
        params = {"kernel": jnp.zeros_like(target)}

        @jax.jit
        def step(carry, key):
            params, state = carry
            noisy = {"kernel": params["kernel"] - target + 0.3 * jax.random.normal(key, target.shape)}
            updates, state = optimizer.update(noisy, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), 400))
        return float(jnp.mean(jnp.square(params["kernel"] - target)))

    exact, coded = final_loss("float32"), final_loss("int8")
    assert exact < 0.02 and abs(coded - exact) < 0.2 * exact


def test_frozen_parameters_leave_and_return():
    params = tree(0)
    trainable, frozen = split_frozen(params, (r"^embed/", "norm"))
    assert len(jax.tree.leaves(trainable)) == 1 and len(jax.tree.leaves(frozen)) == 2
    merged = merge_frozen(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(merged), jax.tree.leaves(params)))


@pytest.mark.parametrize(
    "pattern, said", [("nothing", "finds no parameter"), (".", "every parameter"), ("(", "not a regular")]
)
def test_bad_patterns_are_refused(pattern, said):
    with pytest.raises(InputError, match=said):
        split_frozen(tree(0), (pattern,))


@pytest.mark.parametrize("change", [{"learning_rate": 0.0}, {"beta2": 1.5}, {"clip_norm": 0.0}, {"warmup_steps": -1}])
def test_impossible_values_are_refused(change):
    with pytest.raises(InputError):
        dataclasses.replace(PLAIN, **change)
