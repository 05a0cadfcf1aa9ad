"""Qwen2.5-1M, first of three stages: a context of 65,536 with a RoPE base of 1,000,000.

Command: qwen-jax train long_context_64k
Hardware: v5p-64; docs/tpu.md has memory and times.
Time and result: not run.
Lengths, bases and three rows in four at the full length are published (arXiv 2501.15383); Qwen2.5-Turbo took 40 % and
a base of 10,000,000 (arXiv 2412.15115). Tokens, batch and learning rate are not, and are ours here.
"""

from pathlib import Path

from qwen_jax.sharding import MeshConfig
from train.config import TrainConfig
from train.data.config import DataConfig, LengthShare, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

LENGTH = 65536

config = TrainConfig(
    model="Qwen/Qwen2.5-7B",
    rope_theta=1_000_000.0,
    max_position_embeddings=LENGTH,
    data=DataConfig(
        sources=(
            SourceConfig("data/books/**/*.jsonl.zst", weight=0.6),
            SourceConfig("data/repositories/**/*.jsonl.zst", weight=0.4, repo_level=True),
        ),
        sequence_length=LENGTH,
        batch_size=64,
        length_shares=(LengthShare(0.75, min_tokens=LENGTH), LengthShare(0.25, max_tokens=LENGTH)),
        num_workers=8,
    ),
    steps=2_000,
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=50),
    step=StepConfig(remat="q,k,v,o,attention", accumulate=2),
    mesh=MeshConfig(context=2),
    out=Path("runs/long_context_64k"),
)
