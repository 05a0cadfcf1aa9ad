"""From a context of 4,096 to 32,768: the RoPE base goes from 10,000 to 1,000,000 and three rows in four are long.

Command: qwen-jax train long_context_32k
Hardware: v5e-16; docs/tpu.md has memory and times.
Time and result: not run.
Lengths and bases are those of Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115). They do not say how long the documents
were; the shares are Qwen3's (arXiv 2505.09388): 75 % of 16,384 to 32,768 tokens, 25 % of 4,096 to 16,384. Batch and
learning rate are ours.
"""

from pathlib import Path

from train.config import TrainConfig
from train.data.config import DataConfig, LengthShare, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = TrainConfig(
    model="runs/pretrain_0_5b/final",
    rope_theta=1_000_000.0,
    max_position_embeddings=32768,
    data=DataConfig(
        sources=(
            SourceConfig("data/books/**/*.jsonl.zst", weight=0.5),
            SourceConfig("data/web/**/*.jsonl.zst", weight=0.3),
            SourceConfig("data/code/**/*.jsonl.zst", weight=0.2),
        ),
        sequence_length=32768,
        batch_size=128,
        length_shares=(
            LengthShare(0.75, min_tokens=16384, max_tokens=32769),
            LengthShare(0.25, min_tokens=4096, max_tokens=16384),
        ),
        num_workers=8,
    ),
    steps=25_000,
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=200),
    step=StepConfig(remat="q,k,v,o,attention", accumulate=8),
    out=Path("runs/long_context_32k"),
)
