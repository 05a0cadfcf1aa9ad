"""Qwen2-57B-A14B: 4.5T tokens more, after its 64 experts were made of Qwen2-7B.

Command: make runs/upcycled of Qwen/Qwen2-7B with `qwen-jax upcycle`, then qwen-jax train pretrain_57b_a14b
Hardware: v5p-64; docs/tpu.md has memory and times.
Time and result: not run.
Tokens, 8 of 64 experts and their balance loss of 0.001 are published (arXiv 2407.10671 and the released config); batch
and learning rate are not, and are ours here.
"""

from pathlib import Path

from qwen_jax.sharding import MeshConfig
from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = TrainConfig(
    model="runs/upcycled",
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
    steps=1_073_000,
    optimizer=OptimizerConfig(learning_rate=1e-4),
    step=StepConfig(accumulate=8),
    mesh=MeshConfig(fsdp=8, expert=8),
    out=Path("runs/pretrain_57b_a14b"),
    checkpoint_every=1000,
)
