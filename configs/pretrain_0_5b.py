"""Qwen2.5-0.5B from random weights: the first stage, 18T tokens at a context of 4,096.

Command: qwen-jax train pretrain_0_5b
Hardware: v5e-16; docs/tpu.md has memory and times.
Time and result: not run.
From the report (arXiv 2412.15115): tokens, context, RoPE base. Not published, so Qwen1's (arXiv 2309.16609): batch of
4M tokens, learning rate, schedule, optimiser. The mixture is ours.
"""

import dataclasses
from pathlib import Path

from qwen_jax.presets import load_preset
from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.step import StepConfig

config = TrainConfig(
    architecture=dataclasses.replace(load_preset("qwen2.5-0.5b"), rope_theta=10_000.0, max_position_embeddings=4096),
    data=DataConfig(
        sources=(
            SourceConfig("data/web/**/*.jsonl.zst", weight=0.7),
            SourceConfig("data/code/**/*.jsonl.zst", weight=0.2),
            SourceConfig("data/math/**/*.jsonl.zst", weight=0.1),
        ),
        sequence_length=4096,
        batch_size=1024,
        num_workers=8,
    ),
    steps=4_290_000,
    step=StepConfig(remat="q,k,v,o,attention", accumulate=16),
    out=Path("runs/pretrain_0_5b"),
    checkpoint_every=1000,
)
