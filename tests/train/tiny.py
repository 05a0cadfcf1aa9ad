"""A tiny Qwen2 and Qwen2-MoE with the same weights here and in transformers, and batches for both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig, MoeConfig
from qwen_jax.model import Params, init
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint
from train.batch import TokenBatch
from train.objective import Objective
from train.objectives.pretrain import Pretrain
from train.optimizer import OptimizerConfig
from train.state import Roles, TrainState, new_state, split

CONFIG = ModelConfig(
    model_type="qwen2",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
MOE = dataclasses.replace(
    CONFIG, model_type="qwen2_moe", moe=MoeConfig(8, 2, 24, shared_intermediate_size=32, aux_loss_coef=0.01)
)


def parameters(config: ModelConfig, seed: int = 0) -> Params:
    """Initial parameters with biases and gains that are not trivial."""
    params = init(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def perturb(path, leaf):
        noise = 0.1 if path[-1].key in ("scale", "bias") else 0.0
        return leaf + jnp.asarray(noise * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(perturb, params)


def transformers_model(config: ModelConfig, params: Params, folder: Path):
    """The same model in PyTorch, float32, in training mode."""
    import torch
    import transformers

    save_hf(ParamsCheckpoint(params, config), folder, progress=False)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).train()


def packed_batch(rows: int, length: int, seed: int = 0, vocab: int = 64) -> TokenBatch:
    """Rows of two or three documents and some padding, as the data pipeline makes them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length), dtype=np.int32)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(4, length), 2 + row % 2, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False)):
            segment_ids[row, start:stop], positions[row, start:stop] = number + 1, np.arange(stop - start)
    targets = np.roll(tokens, -1, 1)
    mask = (segment_ids > 0) & (np.roll(segment_ids, -1, 1) == segment_ids)
    mask[:, -1] = False
    return TokenBatch(tokens, targets, positions, segment_ids, mask.astype(np.float32))


def start(params: Params, optimizer: OptimizerConfig, objective: Objective | None = None) -> tuple[TrainState, Roles]:
    """The state before the first update of a policy, and what is frozen."""
    trainable, frozen = split(objective or Pretrain(), optimizer, {"policy": params})
    return new_state(trainable, optimizer), frozen


def full_batch(tokens: np.ndarray) -> TokenBatch:
    """[B, T + 1] token ids as one document a row, which is all that transformers' own loss knows."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    return TokenBatch(
        tokens=tokens[:, :-1].astype(np.int32),
        targets=tokens[:, 1:].astype(np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones((rows, length), np.int32),
        loss_mask=np.ones((rows, length), np.float32),
    )
