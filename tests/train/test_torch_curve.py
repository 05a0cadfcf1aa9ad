"""200 steps of a tiny Qwen2 here and in transformers with torch.optim.AdamW: the same losses.

In float32 to 1e-6, whole or in micro-batches; in bfloat16 as near as PyTorch's are to its own in another order.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.train.tiny import TIED, full_batch, parameters, start, transformers_model
from train.objectives.pretrain import Pretrain
from train.optimizer import OptimizerConfig
from train.step import StepConfig, make_train_step

STEPS, ROWS, LENGTH = 200, 8, 33
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=20)


def batches():
    """Sequences with something to learn: each token is a fixed function of the one before, or noise."""
    rng = np.random.default_rng(0)
    successor = rng.permutation(64)
    for _ in range(STEPS):
        tokens = rng.integers(0, 64, (ROWS, LENGTH))
        for t in range(1, LENGTH):
            tokens[:, t] = np.where(rng.random(ROWS) < 0.8, successor[tokens[:, t - 1]], tokens[:, t])
        yield tokens


def torch_losses(params, folder, dtype=torch.float32, order=slice(None)):
    """(loss, gradient norm) of each step; weights are float32 and cast to `dtype` for each pass, rows in an order."""
    torch.set_num_threads(1)
    model = transformers_model(TIED, params, folder)
    weights = dict(model.named_parameters())
    matrices = [p for p in weights.values() if p.ndim > 1]
    others = [p for p in weights.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=(0.9, 0.95), eps=1e-8)
    scheduler = transformers.get_scheduler(
        "cosine_with_min_lr", optimizer, 20, STEPS, scheduler_specific_kwargs={"min_lr_rate": 0.1}
    )
    for tokens in batches():
        tokens = torch.tensor(tokens[order].copy())
        cast = {name: p.to(dtype) for name, p in weights.items()}
        logits = torch.func.functional_call(model, cast, (tokens[:, :-1],)).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), tokens[:, 1:].reshape(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield loss.item(), norm.item()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def our_losses(params, dtype="float32", **settings):
    state, frozen = start(params, OPTIMIZER)
    step = StepConfig(compute_dtype=dtype, remat="none", **settings)
    train_step = jax.jit(make_train_step(TIED, Pretrain(), OPTIMIZER, step, STEPS), donate_argnums=0)
    for tokens in batches():
        state, metrics = train_step(state, frozen, full_batch(tokens))
        yield float(metrics["loss"]), float(metrics["grad_norm"])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    found = np.array([*torch_losses(parameters(TIED), tmp_path_factory.mktemp("torch") / "model")])
    assert found[0, 0] > 4 and found[-20:, 0].mean() < 2  # it learns
    return found


@pytest.mark.parametrize("accumulate", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_loss_curve_is_pytorch_s(theirs, accumulate):
    ours = np.array([*our_losses(parameters(TIED), accumulate=accumulate)])
    assert np.abs(ours[:, 0] - theirs[:, 0]).max() <= 1e-6
    np.testing.assert_allclose(ours[:50, 1], theirs[:50, 1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["bfloat16", "float32"])
def test_the_bfloat16_curve_is_within_pytorch_s_noise(tmp_path, gradients):
    """Which is how far apart two of its runs are whose rows only come in another order."""
    params = parameters(TIED)
    orders = [slice(None), slice(None, None, -1), np.random.default_rng(1).permutation(ROWS)]
    curves = np.array([
        [loss for loss, _ in torch_losses(params, tmp_path / f"model-{i}", torch.bfloat16, order)]
        for i, order in enumerate(orders)
    ])  # fmt: skip
    ours = np.array([loss for loss, _ in our_losses(params, "bfloat16", gradient_dtype=gradients)])
    mean = curves.mean(0)
    noise = np.sqrt(np.square(curves - mean).sum() / (len(orders) - 1) / STEPS)  # of one run
    apart = np.sqrt(np.square(ours - mean).mean())
    print(f"noise {noise:.2e}, apart {apart:.2e}")
    assert apart <= 2 * noise
