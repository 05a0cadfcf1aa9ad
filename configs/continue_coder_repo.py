"""Qwen2.5-Coder, repository level: 300B tokens of whole repositories at a context of 32,768, after continue_coder_fim.

Command: qwen-jax train continue_coder_repo
Hardware: v5p-64; docs/tpu.md has memory and times.
Time and result: not run.
Tokens, context and RoPE base are published (arXiv 2409.12186); batch, learning rate and the share of fill-in-the-middle
are not, and are ours here. Records have `repo_name` and `files`, see docs/data.md.
"""

from pathlib import Path

from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = TrainConfig(
    model="runs/continue_coder_fim/final",
    rope_theta=1_000_000.0,
    max_position_embeddings=32768,
    data=DataConfig(
        sources=(SourceConfig("data/repositories/**/*.jsonl.zst", repo_level=True),),
        sequence_length=32768,
        batch_size=128,
        fim_rate=0.5,
        num_workers=8,
    ),
    steps=71_500,
    optimizer=OptimizerConfig(learning_rate=1e-5),
    step=StepConfig(remat="minimal", accumulate=4),
    out=Path("runs/continue_coder_repo"),
)
