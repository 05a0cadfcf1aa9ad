"""Qwen2.5-7B's architecture from random weights, on a TPU slice of 128 chips of v5p.

    qwen-jax train pretrain_7b --processes.coordinator auto --data.sources.0.path '/data/text/*.parquet'

Run it on every host of the slice. 4M tokens a step, as the first Qwen (arXiv 2309.16609, section 2.4), whose AdamW,
clipping and schedule these are. `qwen-jax compile` says beforehand what a slice has room for. Not run yet: neither time
nor result is known.
"""

from pathlib import Path

from qwen_jax.sharding import MeshConfig
from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = TrainConfig(
    preset="qwen2.5-7b",
    data=DataConfig((SourceConfig("corpus:english"),), sequence_length=4096, batch_size=1024, num_workers=8),
    steps=500_000,
    out=Path("runs/pretrain_7b"),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    step=StepConfig(remat="full", accumulate=2),
    mesh=MeshConfig(data=4, fsdp=32),
    checkpoint_every=1000,
)
