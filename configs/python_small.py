"""A small Qwen2 learns Python from random weights, on a CPU.

    qwen-jax train python_small

20 million parameters, all but one million of them the embedding of Qwen's own 151,936 tokens; 600 steps of 1024 tokens
of Python's standard library. Needs 2 GiB of memory.
"""

from pathlib import Path

from qwen_jax.config import ModelConfig
from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = TrainConfig(
    architecture=ModelConfig(
        model_type="qwen2",
        vocab_size=151_936,
        hidden_size=128,
        num_layers=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        intermediate_size=384,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
    ),
    data=DataConfig((SourceConfig("corpus:python"),), sequence_length=256, batch_size=4),
    eval_data=DataConfig((SourceConfig("corpus:python", split="held-out"),), sequence_length=256, batch_size=4),
    eval_every=100,
    checkpoint_every=200,
    steps=600,
    out=Path("runs/python_small"),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    step=StepConfig(compute_dtype="float32", remat="dots"),
)
