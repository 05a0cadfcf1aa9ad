"""An adapter for the default model, on a dictionary of Chinese idioms: 20 short steps on two CPU cores.

Command: qwen-jax train lora_demo
Hardware: 2 CPU cores.
Result: runs/lora_demo/final is a PEFT folder of rank 16 over all projections, runs/lora_demo/hf the merged model.
"""

from pathlib import Path

from train.adapter import AdapterConfig
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
    # widened, because on two cores that is faster, and half a billion weights are 1.2 GiB in bfloat16
    adapter=AdapterConfig(rank=16, alpha=32, dequantise=True),
    optimizer=OptimizerConfig(learning_rate=2e-4, schedule="constant", warmup_steps=3, weight_decay=0.0),
    step=StepConfig(remat="none"),
    out=Path("runs/lora_demo"),
    checkpoint_every=20,
    log_every=1,
    export=Path("runs/lora_demo/hf"),
)
