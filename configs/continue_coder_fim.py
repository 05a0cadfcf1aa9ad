"""Qwen2.5-Coder, file level: Qwen2.5-7B continued on 5.2T tokens, with fill-in-the-middle, at a context of 8,192.

Command: qwen-jax train continue_coder_fim
Hardware: v5p-64; docs/tpu.md has memory and times.
Time and result: not run.
Tokens, context, RoPE base and code, text and mathematics as 70:20:10 are published (arXiv 2409.12186); the share of
fill-in-the-middle, batch and learning rate are not, and are ours here.
"""

from pathlib import Path

from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = TrainConfig(
    model="Qwen/Qwen2.5-7B",
    rope_theta=10_000.0,
    max_position_embeddings=8192,
    data=DataConfig(
        sources=(
            SourceConfig("data/code/**/*.jsonl.zst", weight=0.7),
            SourceConfig("data/web/**/*.jsonl.zst", weight=0.2),
            SourceConfig("data/math/**/*.jsonl.zst", weight=0.1),
        ),
        sequence_length=8192,
        batch_size=512,
        fim_rate=0.5,
        num_workers=8,
    ),
    steps=1_240_000,
    optimizer=OptimizerConfig(learning_rate=1e-4),
    step=StepConfig(remat="minimal", accumulate=4),
    out=Path("runs/continue_coder_fim"),
)
