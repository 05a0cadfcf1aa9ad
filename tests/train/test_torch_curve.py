"""200 steps of a tiny Qwen2 here and in transformers with torch.optim.AdamW: the same losses."""

from __future__ import annotations

import jax
import numpy as np
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


def torch_losses(params, folder):
    torch.set_num_threads(1)
    model = transformers_model(TIED, params, folder)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=(0.9, 0.95), eps=1e-8)
    scheduler = transformers.get_scheduler(
        "cosine_with_min_lr", optimizer, 20, STEPS, scheduler_specific_kwargs={"min_lr_rate": 0.1}
    )
    for tokens in batches():
        tokens = torch.tensor(tokens)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), tokens[:, 1:].reshape(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield loss.item(), norm.item()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def our_losses(params):
    state, frozen = start(params, OPTIMIZER)
    step = StepConfig(compute_dtype="float32", remat="none")
    train_step = jax.jit(make_train_step(TIED, Pretrain(), OPTIMIZER, step, STEPS), donate_argnums=0)
    for tokens in batches():
        state, metrics = train_step(state, frozen, full_batch(tokens))
        yield float(metrics["loss"]), float(metrics["grad_norm"])


def test_the_loss_curve_is_pytorch_s(tmp_path):
    theirs = np.array(list(torch_losses(parameters(TIED), tmp_path / "model")))
    ours = np.array(list(our_losses(parameters(TIED))))
    difference = np.abs(ours[:, 0] - theirs[:, 0])
    assert theirs[0, 0] > 4 and theirs[-20:, 0].mean() < 2  # it learns
    assert difference.max() <= 1e-6
    np.testing.assert_allclose(ours[:50, 1], theirs[:50, 1], rtol=1e-3)
