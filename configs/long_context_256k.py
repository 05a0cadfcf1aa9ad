"""Qwen2.5-1M, third of three stages: a context of 262,144 with a RoPE base of 10,000,000.

Command: qwen-jax train long_context_256k
Hardware: v5p-64; docs/tpu.md has memory and times.
Time and result: not run. What is published and what is ours: see long_context_64k.py.
"""

import dataclasses
from pathlib import Path

from configs.long_context_64k import config as first
from qwen_jax.sharding import MeshConfig
from train.data.config import LengthShare
from train.step import StepConfig

LENGTH = 262144

config = dataclasses.replace(
    first,
    model="runs/long_context_128k/final",
    rope_theta=10_000_000.0,
    max_position_embeddings=LENGTH,
    data=dataclasses.replace(
        first.data,
        sequence_length=LENGTH,
        batch_size=16,
        length_shares=(LengthShare(0.75, min_tokens=LENGTH), LengthShare(0.25, max_tokens=LENGTH)),
    ),
    step=StepConfig(remat="q,k,v,attention"),
    mesh=MeshConfig(context=4),
    out=Path("runs/long_context_256k"),
)
