"""Qwen-7B, the first one, from random weights: the one pretraining whose hyper-parameters are all published.

Command: qwen-jax train pretrain_7b
Hardware: v5p-64; docs/tpu.md has memory and times.
Time and result: not run.
2.2T tokens at a context of 2,048 in batches of 4M; AdamW 0.9, 0.95, 1e-8, decay 0.1, clipping at 1; 3e-4 falling along
a cosine to a tenth, 2,000 steps of warm-up (arXiv 2309.16609 and the model's memo; these are our defaults too).
Documents are shuffled, joined and cut wherever a row ends.
"""

from pathlib import Path

from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = TrainConfig(
    preset="qwen-7b-v1.0",
    data=DataConfig(
        sources=(
            SourceConfig("data/web/**/*.jsonl.zst", weight=0.8),
            SourceConfig("data/code/**/*.jsonl.zst", weight=0.2),
        ),
        sequence_length=2048,
        batch_size=2048,
        packing="concat",
        num_workers=8,
    ),
    steps=524_500,
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=2000, final_fraction=0.1),
    step=StepConfig(remat="minimal", accumulate=4),
    out=Path("runs/pretrain_7b"),
    checkpoint_every=1000,
)
