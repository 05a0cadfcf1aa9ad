"""`qwen-jax compile`: what a program would do on a TPU or GPU that is not there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from typing import TYPE_CHECKING, Literal

import tyro

from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from aot.chips import Topology
    from aot.programs import Program
    from qwen_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compiles the program that trains or decodes, for chips that this machine need not have.

    Prints the chips, the memory against what a chip has, the FLOPs, a census of the collectives and roofline times.
    Compiling takes half a minute to several minutes; what has been compiled once is kept. Exit status 1 when a program
    does not fit.
    """

    model: str = ""
    """a model of `qwen-jax models`, or a folder or config.json file"""
    experiment: str = ""
    """instead of a model: an experiment of `qwen-jax train`, as it stands"""
    topology: str = ""
    """a TPU slice, by its shape or its number of chips: v5p:4x4x8, v5e-16; or several, 2xv5e-256"""
    gpu: str = ""
    """instead of a TPU slice: GPUs of one machine, such as h200 or h200-8"""
    step: Literal["train", "prefill", "decode"] = "train"
    """what to compile"""
    mesh: str = ""
    """sizes of the axes data, fsdp, tensor, context, expert, as fsdp=32,tensor=4; by default chosen for the model"""
    batch: int = 0
    """rows of the whole slice; by default one for each part of the batch that the mesh makes"""
    sequence: int = 4096
    """tokens per row; for decode, slots of the cache"""
    remat: str = "full"
    """what the backward pass recomputes: none, minimal, dots, full, offload, or a list of what it does not"""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """storage of the optimiser's moments"""
    accumulate: int = 1
    """micro-batches of a training step"""
    weights: Literal["bfloat16", "int8", "int4", "nf4"] = "bfloat16"
    """of the layers' matrices, in prefill, decode and under an adapter; int4 by 128, as GPTQ has them, nf4 by 64"""
    cache_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """of the keys and values that prefill and decode keep"""
    adapter: int = 0
    """rank of LoRA over every projection, which is then all that is trained"""
    search: bool = False
    """try meshes, rematerialisation and batch sizes for the slice, and rank those that fit; seconds each"""
    table: bool = False
    """print the table of docs/tpu.md; what is not in the cache yet is compiled, half an hour on one core"""
    json: bool = False
    """print JSON; sizes in bytes, times in seconds"""


def main(argv: list[str]) -> int:
    """The subcommand `compile`. Raises InputError for what no program or slice is."""
    options = tyro.cli(Compile, args=argv, prog="qwen-jax compile", config=(tyro.conf.FlagCreatePairsOff,))
    if options.table:
        from aot.table import main as table

        return table(as_json=options.json)
    program = program_of(options)
    if options.search:
        from aot.search import main as search

        return search(program, as_json=options.json)
    from aot.compiler import Compiler
    from aot.report import console, print_report, progress

    with progress() as say, Compiler() as compiler:
        result = compiler(program, say=say)
    if options.json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        print_report(result, console())
    return 0 if result.fits else 1


def program_of(options: Compile) -> Program:
    """The program that the options describe, mesh and batch filled in. Raises InputError for what is missing."""
    from aot.programs import Program
    from aot.targets import parse_target
    from qwen_jax.sharding import AXES, RULES, MeshConfig

    if bool(options.model) == bool(options.experiment):
        raise InputError(
            "say which model to compile, such as --model qwen2.5-7b (`qwen-jax models` lists them), or else which "
            "--experiment of `qwen-jax train`; not both."
        )
    if bool(options.topology) == bool(options.gpu):
        raise InputError("give either --topology with a TPU slice, such as v5p:4x4x8 or v5e-16, or --gpu h200-8.")
    gpu = options.gpu if "-" in options.gpu or not options.gpu else f"{options.gpu}-1"
    target = options.topology or gpu
    if options.experiment:
        from aot.experiments import program_of as program_of_experiment

        changed = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default]
        if others := set(changed) - {"experiment", "topology", "gpu", "json"}:
            raise InputError(f"--{min(others)} is the experiment's own; leave it out, or name a --model.")
        return program_of_experiment(options.experiment, target)
    program = Program(
        model=options.model,
        target=target,
        step=options.step,
        batch=options.batch or 1,
        sequence=options.sequence,
        remat=options.remat,
        moments=options.moments,
        accumulate=options.accumulate,
        weights=options.weights,
        cache_dtype=options.cache_dtype,
        adapter=options.adapter,
    )
    topology = parse_target(target)
    num_devices = topology.num_devices
    mesh = MeshConfig.parse(options.mesh) if options.mesh else default_mesh(program, topology)
    mesh = mesh.for_model(program.config, num_devices, topology.num_slices)
    sizes: dict[str, int] = dict(zip(AXES, mesh.sizes(num_devices), strict=True))
    rows = math.prod(sizes[axis] for axis in RULES.batch) * options.accumulate
    used = tuple((axis, size) for axis, size in sizes.items() if size != 1)
    return dataclasses.replace(program, mesh=used, batch=options.batch or rows)


def default_mesh(program: Program, topology: Topology) -> MeshConfig:
    """For training that of `qwen-jax train`; for inference as much tensor as divides the model."""
    from qwen_jax.sharding import MeshConfig, check_divides, divisors

    if program.step == "train":
        return MeshConfig()
    num_devices, config = topology.num_devices, program.config
    for tensor in reversed(divisors(num_devices // topology.num_slices)):
        sizes = {"data": num_devices // tensor, "fsdp": 1, "tensor": tensor, "context": 1, "expert": 1}
        with contextlib.suppress(InputError):
            check_divides(config, sizes)
            return MeshConfig(**sizes)
    raise AssertionError("tensor=1 divides every model")
