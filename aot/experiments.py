"""The experiments of configs/ as programs: each as it stands, for every slice that its docstring names."""

from __future__ import annotations

import dataclasses
import re

from aot.programs import Program
from aot.targets import parse_target
from qwen_jax.config import ModelConfig
from qwen_jax.presets import load_preset
from qwen_jax.sharding import AXES
from train.config import TrainConfig, experiments, load_experiment
from train.weights import architecture_of

# Whose architecture has what an experiment starts from: the default model, and what `qwen-jax upcycle` makes.
_STARTS = {"default": "qwen2.5-coder-0.5b-instruct", "runs/upcycled": "qwen2-57b-a14b"}
_SLICE = re.compile(r"\b(?:\d+ x )?(?:v5e|v5p|v6e|tpu7x)[-:]\d+(?:x\d+)*\b")


def slices(docstring: str) -> list[str]:
    """The TPU slices that an experiment's docstring names behind `Hardware:`."""
    line = re.search(r"^Hardware:(.*)$", docstring, re.MULTILINE)
    return _SLICE.findall(line[1]) if line else []


def architecture(config: TrainConfig) -> ModelConfig:
    """What an experiment trains, without the weights that it starts from; they may be another experiment's."""
    if config.preset or config.architecture:
        return architecture_of(config, None)
    if found := re.fullmatch(r"runs/(\w+)/final", config.model):
        start = architecture(load_experiment(found[1])[0])
    else:
        start = load_preset(_STARTS.get(config.model, config.model))
        if config.model == "default":
            start = dataclasses.replace(start, tie_word_embeddings=False)  # its GGUF file has a head of its own
    return architecture_of(config, _Start(start))


@dataclasses.dataclass(frozen=True)
class _Start:
    """A checkpoint of which only the configuration is asked."""

    config: ModelConfig


def programs() -> list[Program]:
    """Every experiment on every slice that it names."""
    return [program_of(name, target) for name in experiments() for target in slices(load_experiment(name)[1])]


def program_of(name: str, target: str) -> Program:
    """The step of an experiment on a slice. Raises InputError for what there is not or does not fit together."""
    config, _ = load_experiment(name)
    topology = parse_target(target)
    mesh = config.mesh.for_model(architecture(config), topology.num_devices, topology.num_slices)
    sizes = dict(zip(AXES, mesh.sizes(topology.num_devices), strict=True))
    return Program(
        model=name,
        target=target,
        step="train",
        batch=config.data.batch_size,
        sequence=config.data.sequence_length,
        mesh=tuple((axis, size) for axis, size in sizes.items() if size != 1),
        remat=config.step.remat,
        moments=config.optimizer.moments,
        accumulate=config.step.accumulate,
        experiment=True,
    )
