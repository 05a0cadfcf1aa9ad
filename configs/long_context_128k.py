"""Qwen2.5-1M, second of three stages: a context of 131,072 with a RoPE base of 5,000,000.

Command: qwen-jax train long_context_128k
Hardware: v5p-64; docs/tpu.md has memory and times.
Time and result: not run. What is published and what is ours: see long_context_64k.py.
"""

import dataclasses
from pathlib import Path

from configs.long_context_64k import config as first
from qwen_jax.sharding import MeshConfig
from train.data.config import LengthShare

LENGTH = 131072

config = dataclasses.replace(
    first,
    model="runs/long_context_64k/final",
    rope_theta=5_000_000.0,
    max_position_embeddings=LENGTH,
    data=dataclasses.replace(
        first.data,
        sequence_length=LENGTH,
        batch_size=32,
        length_shares=(LengthShare(0.75, min_tokens=LENGTH), LengthShare(0.25, max_tokens=LENGTH)),
    ),
    mesh=MeshConfig(context=4),
    out=Path("runs/long_context_128k"),
)
