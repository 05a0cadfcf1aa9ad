"""A small Qwen1 trained at 512 tokens, to see how far its long-context schemes carry it.

Command: qwen-jax data tokenizer corpus:english corpus:python --vocab-size 2048 --out runs/tokenizer
         qwen-jax train long_context_tiny
Hardware: 2 CPU cores, 1 GiB of memory.
Time: 0.31 s a step where nothing else runs, and so 23 minutes.
Result (2026-11-21): held-out loss 2.64 nats per token; perplexity by length in docs/long-context.md. Of that run
the first 2,660 steps were made under a schedule of 6,000, the others under this one, a little lower.
"""

from pathlib import Path

from qwen_jax.config import DynamicNtkScaling, ModelConfig
from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

LENGTH = 512

config = TrainConfig(
    model="runs/tokenizer",
    architecture=ModelConfig(
        model_type="qwen",
        vocab_size=2048,
        hidden_size=192,
        num_layers=4,
        num_heads=3,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=512,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=DynamicNtkScaling(LENGTH),
        logn_trained_length=LENGTH,
    ),
    data=DataConfig((SourceConfig("corpus:python"),), sequence_length=LENGTH, batch_size=4, packing="concat"),
    eval_data=DataConfig(
        (SourceConfig("corpus:python", split="held-out"),), sequence_length=LENGTH, batch_size=4, packing="concat"
    ),
    eval_every=550,
    eval_batches=8,
    steps=4400,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    step=StepConfig(remat="none"),
    out=Path("runs/long_context_tiny"),
    checkpoint_every=550,
)
