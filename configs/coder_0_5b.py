"""Qwen2.5-Coder-0.5B goes on learning code, on one accelerator.

    qwen-jax train coder_0_5b --data.sources.0.path 'code/**/*.jsonl'

The recipe is that of Code-Qwen (Qwen report, arXiv 2309.16609, section 4.1): 3 % of warm-up, then a constant learning
rate, here with fill-in-the-middle for half of the documents, as Qwen2.5-Coder's pretraining has it. The weights are the
default model's; `--model Qwen/Qwen2.5-Coder-0.5B` takes the base model. Meant for a GPU or TPU with 80 GB; with less,
raise step.accumulate. Not run yet: neither time nor result is known.
"""

from pathlib import Path

from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = TrainConfig(
    data=DataConfig((SourceConfig("corpus:python"),), sequence_length=4096, batch_size=16, fim_rate=0.5),
    eval_data=DataConfig((SourceConfig("corpus:python", split="held-out"),), sequence_length=4096, batch_size=16),
    steps=1000,
    out=Path("runs/coder_0_5b"),
    optimizer=OptimizerConfig(learning_rate=3e-5, schedule="constant", warmup_steps=30),
    step=StepConfig(remat="dots", accumulate=2),
)
