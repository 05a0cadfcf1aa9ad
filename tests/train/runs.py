"""A tiny run in a folder of its own, started as a user would: `qwen-jax train experiment.py` in its own process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from qwen_jax.model import init
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint, flatten, load_params
from tests.train.data_tools import byte_tokenizer, write_jsonl
from tests.train.tiny import CONFIG

ROOT = Path(__file__).resolve().parents[2]
MODEL = dataclasses.replace(CONFIG, vocab_size=264)
EXPERIMENT = '''"""A tiny run."""
from pathlib import Path

from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

HERE = Path(__file__).parent
data = DataConfig((SourceConfig(str(HERE / "data.jsonl")),), sequence_length=32, batch_size=8, packing="concat")
config = TrainConfig(
    data=data,
    steps=12,
    out=HERE / "out",
    model=str(HERE / "model"),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    step=StepConfig(compute_dtype="float32", remat="none"),
    checkpoint_every=3,
    log_every=1,
)
'''
WORDS = "def return if else for in range print import while class self none true false and or not".split()


def make_run(folder: Path) -> Path:
    """Data, model and experiment in `folder`; returns the experiment's file."""
    rng = np.random.default_rng(0)
    write_jsonl(folder / "data.jsonl", [" ".join(rng.choice(WORDS, rng.integers(3, 30))) for _ in range(400)])
    save_hf(ParamsCheckpoint(init(MODEL, jax.random.key(0)), MODEL), folder / "model", progress=False)
    byte_tokenizer().save(folder / "model")
    (folder / "experiment.py").write_text(EXPERIMENT)
    return folder / "experiment.py"


def command(experiment: Path, *arguments: str, first: str = "") -> list[str]:
    """`first`: Python to run before, as a fault of its environment."""
    program = f"{first}\nimport sys; from qwen_jax.cli import main; main(sys.argv[1:])"
    return [sys.executable, "-c", program, "train", str(experiment), *arguments]


def environment(experiment: Path, devices: int = 1) -> dict[str, str]:
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        # runs of one experiment compile once
        "JAX_COMPILATION_CACHE_DIR": str(experiment.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(experiment: Path, *arguments: str, first: str = "", devices: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(experiment, *arguments, first=first),
        env=environment(experiment, devices),
        stderr=subprocess.PIPE,
        text=True,
    )


def run(experiment: Path, *arguments: str, devices: int = 1) -> tuple[int, str]:
    """(exit status, what was written to stderr)."""
    process = start(experiment, *arguments, devices=devices)
    _, text = process.communicate()
    assert "Traceback" not in text, text
    return process.returncode, text


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Returns while the run is just after `step`."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"the run ended before step {step}")


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert len(steps) == len(set(steps))
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def final_weights(out: Path) -> dict[str, np.ndarray]:
    from qwen_jax.weights.open import open_checkpoint

    return {
        path: np.asarray(leaf) for path, leaf in flatten(load_params(open_checkpoint(out / "final"), progress=False))
    }
