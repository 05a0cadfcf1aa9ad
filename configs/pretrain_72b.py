"""Qwen2.5-72B from random weights: the first stage, 18T tokens at a context of 4,096.

Command: qwen-jax train pretrain_72b --processes.coordinator auto
Hardware: v5p-128; docs/tpu.md has memory and times. pretrain_72b_v5e.py is for smaller chips.
Time and result: not run.
Tokens, context and RoPE base are published (arXiv 2412.15115); batch and learning rate are not, and are ours here.
"""

import dataclasses
from pathlib import Path

from configs.pretrain_0_5b import config as small
from qwen_jax.presets import load_preset
from qwen_jax.sharding import MeshConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = dataclasses.replace(
    small,
    architecture=dataclasses.replace(load_preset("qwen2.5-72b"), rope_theta=10_000.0, max_position_embeddings=4096),
    optimizer=OptimizerConfig(learning_rate=1.5e-4),
    step=StepConfig(remat="minimal", accumulate=8),
    mesh=MeshConfig(fsdp=64, tensor=2),
    out=Path("runs/pretrain_72b"),
)
