"""A small Qwen2 from random weights on the King James Bible and Python's language reference.

Command: make train-demo, which is
    qwen-jax data tokenizer corpus:english corpus:python --vocab-size 2048 --out runs/tokenizer
    qwen-jax train pretrain_tiny
    qwen-jax generate --model runs/pretrain_tiny/final "And the king said unto" ...
Hardware: 2 CPU cores, 1 GiB of memory.
Time: 0.24 s a step and so 4.4 minutes of training (the median of 1,100 steps, part of them on a busy machine).
Result (2026-11-21): held-out loss 4.29 nats per token after 550 steps, 3.83 at the end; the first step's loss is 7.66.
    And the king said unto | Moses, These are he hath spiritful, and have not afraid, and come into his father ...
"""

from pathlib import Path

from qwen_jax.config import ModelConfig
from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

LENGTH = 256

config = TrainConfig(
    model="runs/tokenizer",
    architecture=ModelConfig(
        model_type="qwen2",
        vocab_size=2048,
        hidden_size=192,
        num_layers=4,
        num_heads=3,
        num_kv_heads=1,
        head_dim=64,
        intermediate_size=640,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
    ),
    data=DataConfig((SourceConfig("corpus:english"),), sequence_length=LENGTH, batch_size=4),
    eval_data=DataConfig((SourceConfig("corpus:english", split="held-out"),), sequence_length=LENGTH, batch_size=4),
    eval_every=550,
    eval_batches=16,
    steps=1100,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=40),
    step=StepConfig(remat="none"),
    out=Path("runs/pretrain_tiny"),
    checkpoint_every=550,
    log_every=100,
)
