"""pretrain_72b on chips of 16 GB.

Command: qwen-jax train pretrain_72b_v5e --processes.coordinator auto
Hardware: v5e-256; docs/tpu.md has memory and times.
Time and result: not run.
What is published and what is ours: see pretrain_72b.py.
"""

import dataclasses
from pathlib import Path

from configs.pretrain_72b import config as on_v5p
from qwen_jax.sharding import MeshConfig
from train.step import StepConfig

config = dataclasses.replace(
    on_v5p,
    # two chips to a tensor send each other a third of what four would; the host has room for what is kept
    step=StepConfig(remat="residual@host,q@host,k@host,v@host,attention@host,o@host", accumulate=8),
    mesh=MeshConfig(fsdp=128, tensor=2),
    out=Path("runs/pretrain_72b_v5e"),
)
