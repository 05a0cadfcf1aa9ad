"""A small Qwen2 from random weights on the King James Bible and Python's language reference: `make train-demo`.

Command: make train-demo, which is: qwen-jax data tokenizer corpus:english --vocab-size 2048 --out runs/tokenizer
         qwen-jax train pretrain_tiny
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
