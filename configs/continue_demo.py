"""The default model goes on with a dictionary of Chinese idioms: 20 short steps on two CPU cores.

Command: qwen-jax train continue_demo
Hardware: 2 CPU cores, 7 GiB of memory.
Time: 5.2 s a step where nothing else runs, and a minute or two to read and write the weights.
Result (2026-11-21): perplexity of 1,024 held-out tokens in rows of 256 falls from 107.72 to 70.42 (float32);
transformers reads 70.42 too from the exported folder, 4.254488 nats per token where ours is 4.254504.
"""

from pathlib import Path

from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

config = TrainConfig(
    data=DataConfig((SourceConfig("corpus:chinese"),), sequence_length=256, batch_size=2),
    eval_data=DataConfig((SourceConfig("corpus:chinese", split="held-out"),), sequence_length=256, batch_size=2),
    eval_every=10,
    eval_batches=4,
    steps=20,
    # attention and norms alone are trained, 44M of 630M weights, which takes half the memory and less time
    optimizer=OptimizerConfig(
        learning_rate=1e-4, schedule="constant", warmup_steps=3, frozen=("^embed/", "^lm_head/", "/mlp/")
    ),
    step=StepConfig(remat="none"),
    out=Path("runs/continue_demo"),
    checkpoint_every=20,
    log_every=1,
    export=Path("runs/continue_demo/hf"),
)
