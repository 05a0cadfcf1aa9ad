"""Code-Qwen: Qwen-7B continued on 90B tokens of code and text at a context of 8,192.

Command: qwen-jax train continue_code
Hardware: v5p-32; docs/tpu.md has memory and times.
Time and result: not run.
Tokens, context, 3 % of warm-up and then a constant 3e-5 (6e-5 for 14B) are published (arXiv 2309.16609, section 4); the
batch and the mixture are not, and are ours here.
"""

from pathlib import Path

from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

STEPS = 21_458

config = TrainConfig(
    model="Qwen/Qwen-7B",
    data=DataConfig(
        sources=(
            SourceConfig("data/code/**/*.jsonl.zst", weight=0.8),
            SourceConfig("data/web/**/*.jsonl.zst", weight=0.2),
        ),
        sequence_length=8192,
        batch_size=512,
        num_workers=8,
    ),
    steps=STEPS,
    optimizer=OptimizerConfig(learning_rate=3e-5, schedule="constant", warmup_steps=round(0.03 * STEPS)),
    step=StepConfig(remat="minimal", accumulate=8),
    out=Path("runs/continue_code"),
)
