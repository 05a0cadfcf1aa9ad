"""One training run as typed values. An experiment is a Python file in configs/ whose `config` is a TrainConfig."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import runpy
from pathlib import Path

import tyro

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.local_path import LocalPath, local_path
from qwen_jax.sharding import MeshConfig
from train.adapter import AdapterConfig
from train.data.config import DataConfig
from train.objective import Objective
from train.objectives.pretrain import Pretrain
from train.optimizer import OptimizerConfig
from train.step import StepConfig

# beside this package both in a checkout and where pip installs it
EXPERIMENTS = Path(__file__).resolve().parent.parent / "configs"


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """How the processes of one run find each other; a single process needs none of it."""

    coordinator: str | None = None
    """HOST:PORT of process 0; or `auto`, where Cloud TPU, GKE, Slurm or Open MPI tell a process all it must know."""
    count: int | None = None
    """Number of processes, with HOST:PORT."""
    index: int | None = None
    """Which of them this one is, with HOST:PORT."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run: model, data, optimiser, mesh, and what is kept of it."""

    data: DataConfig
    """What is learned."""
    steps: int
    """Updates of the weights in all."""
    out: LocalPath
    """Folder of checkpoints, metrics and final weights. A run that finds checkpoints there goes on from the last."""
    model: str = "default"
    """Weights to start from: `default`, a folder, a .gguf file or a Hugging Face id. Its tokenizer is used too."""
    architecture: tyro.conf.Suppress[ModelConfig | None] = None
    """Start from random weights of this architecture; of `model` only the tokenizer is used, and needed."""
    preset: str | None = None
    """Start from random weights of this released model's architecture; of `model` only the tokenizer is used."""
    rope_theta: float | None = None
    """RoPE base to go on with instead of the checkpoint's, for stages of longer sequences."""
    max_position_embeddings: int | None = None
    """Context length that the trained model declares instead of the checkpoint's."""
    seed: int = 0
    """Of random weights; the data has a seed of its own."""
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    """LoRA or DoRA over frozen weights, instead of training these; OUT/final is then a PEFT folder, and `export` the
    model with the adapter added."""
    objective: Objective = dataclasses.field(default_factory=Pretrain)
    """What is minimised."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    processes: ProcessesConfig = dataclasses.field(default_factory=ProcessesConfig)
    eval_data: DataConfig | None = None
    """What the loss is measured on besides."""
    eval_every: int = 500
    """Steps between evaluations."""
    eval_batches: int = 16
    """Batches of an evaluation, always the same ones."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at the end too, and on SIGTERM."""
    keep: int = 2
    """Latest checkpoints that are kept, besides the one of the lowest evaluation loss."""
    stop_grace: float = 120.0
    """Seconds after SIGTERM or Ctrl-C within which a step must end; else the process ends without saving."""
    log_every: int = 10
    """Steps between lines where the output is no terminal. Metrics are recorded at every step."""
    profile_at: int | None = None
    """Step from which three steps are traced for TensorBoard's profiler and Perfetto."""
    export: LocalPath | None = None
    """Folder to write the final weights to in Hugging Face's form, bfloat16, besides our own in OUT/final."""

    def __post_init__(self) -> None:
        local_path(self.out)
        counts = ("steps", "eval_every", "eval_batches", "checkpoint_every", "keep", "log_every")
        if wrong := [name for name in counts if getattr(self, name) < 1]:
            raise InputError(f"{wrong[0]} is {getattr(self, wrong[0])}; it must be at least 1.")
        if self.data.batch_size % self.step.accumulate:
            raise InputError(
                f"a batch of {self.data.batch_size} rows cannot be cut into {self.step.accumulate} micro-batches; "
                "make step.accumulate a divisor of data.batch_size."
            )
        if self.preset and self.architecture:
            raise InputError(f"preset {self.preset!r} and the experiment's own architecture exclude each other.")
        if (self.preset or self.architecture) and (self.rope_theta or self.max_position_embeddings):
            raise InputError(
                "rope_theta and max_position_embeddings change the checkpoint that a run starts from, and this one "
                "starts from random weights; leave them out, or leave out preset and architecture."
            )


def experiments() -> dict[str, str]:
    """Names of the experiments in configs/, each with the first line of its docstring."""
    files = sorted(EXPERIMENTS.glob("*.py"))
    summaries = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
    return {name: (text or "").split("\n")[0] for name, text in summaries.items() if name != "__init__"}


def load_experiment(name: str) -> tuple[TrainConfig, str]:
    """The `config` of an experiment and its docstring, by its name in configs/ or the path of its file.

    Raises InputError when there is no such experiment, or its file does not define a TrainConfig.
    """
    path = Path(name) if name.endswith(".py") else EXPERIMENTS / f"{name}.py"
    if not path.exists():
        close = difflib.get_close_matches(name, experiments(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`qwen-jax train --help` lists those that exist."
        raise InputError(f"there is no experiment {name}; {hint}")
    try:
        variables = runpy.run_path(str(path))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} does not run ({type(error).__name__}: {error}); correct it.") from error
    if not isinstance(variables.get("config"), TrainConfig):
        raise InputError(f"{path} does not define `config`, a train.config.TrainConfig; see configs/ for examples.")
    return variables["config"], variables.get("__doc__") or ""
