"""`qwen-jax compile --search`: which meshes, rematerialisation and batch sizes fit a slice, in seconds each."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aot.chips import GIB, Topology
from aot.programs import Program
from aot.targets import parse_target
from qwen_jax import flops
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.sharding import AXES, RULES, check_divides, divisors

# The early estimate was 1 to 18 % below what the compiled program takes (docs/tpu.md).
MARGIN = 1.25
# Meshes that are looked at, the fastest by formula.
MAX_MESHES = 16

# Forward passes' worth that each policy computes again in the backward pass.
_RECOMPUTED = {"none": 0.0, "minimal": 0.0, "dots": 0.1, "full": 1.0, "offload": 1.0}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A program, the seconds a step needs by formula, and what it would take of a chip's memory."""

    program: Program
    compute_seconds: float
    link_seconds: float
    needed: int | None = None
    problem: str = ""

    @property
    def step_seconds(self) -> float:
        """Compute and links at the same time."""
        return max(self.compute_seconds, self.link_seconds)

    @property
    def tokens_per_second(self) -> float:
        program = self.program
        return program.batch * (1 if program.step == "decode" else program.sequence) / self.step_seconds


def candidates(base: Program, topology: Topology) -> list[Candidate]:
    """Programs to try, the fastest by formula first."""
    config = base.config
    found = []
    for sizes in meshes(config, base, topology):
        parts = 1
        for axis in RULES.batch:
            parts *= sizes[axis]
        used = tuple((axis, size) for axis, size in sizes.items() if size != 1)
        for rows, remat in itertools.product((1, 2, 4, 8), _policies(base)):
            program = dataclasses.replace(base, mesh=used, batch=parts * rows, remat=remat)
            found.append(Candidate(program, *step_times(config, program, sizes, topology)))
    return sorted(found, key=lambda c: -c.tokens_per_second)


def _policies(base: Program) -> Sequence[str]:
    return ("none", "minimal", "dots", "full", "offload") if base.step == "train" else ("full",)


def meshes(config: ModelConfig, base: Program, topology: Topology) -> Iterator[dict[str, int]]:
    """Axis sizes in powers of two that multiply to the slice and that the model can be cut into."""
    devices = topology.num_devices
    for fsdp, tensor, context, expert in itertools.product(divisors(devices), repeat=4):
        shared = fsdp * tensor * context * expert
        if devices % shared or tensor > 16 or context > 16 or expert > (64 if config.moe else 1):
            continue
        if base.step != "train" and (fsdp > 1 or context > 1):
            continue
        if base.sequence % (context * tensor):
            continue
        sizes: dict[str, int] = dict(zip(AXES, (devices // shared, fsdp, tensor, context, expert), strict=True))
        try:
            check_divides(config, sizes)
        except InputError:
            continue
        yield sizes


def step_times(
    config: ModelConfig, program: Program, sizes: Mapping[str, int], topology: Topology
) -> tuple[float, float]:
    """(compute, links) seconds of a step by formula: peak FLOPs, and the bytes that FSDP, tensor and expert axes move.

    Each link formula is that of a ring over all links of a chip (Scaling Book, jax-ml.github.io/scaling-book, 5): FSDP
    gathers a layer's bfloat16 weights twice and scatters its gradients once; tensor gathers and scatters the
    activations of each layer twice, forward and backward; an expert axis sends each token to its experts and back.
    """
    chip, devices = topology.chip, topology.num_devices
    work = flops.model_flops(config, program.step, program.batch, program.sequence)
    train = program.step == "train"
    if train:
        work *= 1 + _RECOMPUTED[program.remat] / 3
    links = 2 * len(topology.shape) if not chip.is_gpu else 1
    bandwidth = max(1, links // 2) * chip.link_bandwidth
    passes = (2 + _RECOMPUTED[program.remat]) if train else 1
    shard = sizes["tensor"] * sizes["expert"]
    weights = 2 * config.num_params() / shard * (passes + 1 if train else 0) * (sizes["fsdp"] > 1)
    replicas = sizes["data"] > 1 and train
    gradients = 2 * 4 * config.num_params() / shard / sizes["fsdp"] * replicas
    tokens = program.batch * (1 if program.step == "decode" else program.sequence)
    local = tokens / (sizes["data"] * sizes["fsdp"] * sizes["context"] * sizes["expert"])
    activation = 2 * local * config.hidden_size * config.num_layers
    tensor = 4 * activation * (passes if train else 1) * (sizes["tensor"] > 1)
    top_k = config.moe.top_k if config.moe else 0
    expert = 2 * top_k * activation * (passes if train else 1) * (sizes["expert"] > 1)
    return work / devices / chip.peak_flops, (weights + gradients + tensor + expert) / bandwidth


def search(base: Program, limit: int = 40) -> Iterator[Candidate]:
    """Candidates in order of speed with what the compiler says they need, until it has been asked about `limit`.

    It is not asked about a mesh on which not even one row with everything recomputed fits, nor about more rows, or
    less recomputation, than what did not fit on a mesh.
    """
    from aot.compiler import Compiler

    topology = parse_target(base.target)
    too_large: list[Program] = []
    asked = 0
    with Compiler() as compiler:

        def ask(candidate: Candidate) -> Candidate:
            nonlocal asked
            asked += 1
            try:
                result = compiler(candidate.program, "estimate")
            except InputError as error:
                too_large.append(candidate.program)
                return dataclasses.replace(candidate, problem=str(error))
            needed = (
                result.out_of_memory.needed if result.out_of_memory else result.memory.total if result.memory else 0
            )
            answered = dataclasses.replace(candidate, needed=needed)
            if not fits(answered, topology):
                too_large.append(candidate.program)
            return answered

        queue = candidates(base, topology)
        looked_at = list(dict.fromkeys(candidate.program.mesh for candidate in queue))[:MAX_MESHES]
        queue = [candidate for candidate in queue if candidate.program.mesh in looked_at]
        for mesh in looked_at:
            ask(min((c for c in queue if c.program.mesh == mesh), key=lambda c: _sizes(c.program)))
        asked = 0
        for candidate in queue:
            program = candidate.program
            if asked < limit and not any(
                program.mesh == other.mesh and all(a >= b for a, b in zip(_sizes(program), _sizes(other), strict=True))
                for other in too_large
            ):
                yield ask(candidate)


def _sizes(program: Program) -> tuple[float, float]:
    """Two numbers with each of which a program's memory grows."""
    return program.batch, -list(_RECOMPUTED).index(program.remat)


def fits(candidate: Candidate, topology: Topology) -> bool:
    return candidate.needed is not None and candidate.needed * MARGIN <= topology.chip.hbm_bytes


def main(base: Program, *, as_json: bool) -> int:
    """Prints the candidates that fit, the fastest first; exit status 1 when none does."""
    from rich.table import Table

    from aot.report import console, gib, progress, seconds

    topology = parse_target(base.target)
    capacity = topology.chip.hbm_bytes
    found = []
    with progress() as say:
        for i, candidate in enumerate(search(base)):
            found.append(candidate)
            say(f"{i + 1} tried, {sum(fits(c, topology) for c in found)} fit")
    fitting = [c for c in found if fits(c, topology)]
    if as_json:
        print(json.dumps([_plain(c, topology) for c in found], indent=2))
        return 0 if fitting else 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("mesh", "remat"):
        table.add_column(heading, no_wrap=True)
    for heading in ("batch", f"GiB of {capacity / GIB:.2f}", "compute", "links", "tokens/s a chip"):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in fitting[:20]:
        assert c.needed
        mesh = ",".join(f"{axis}={size}" for axis, size in c.program.mesh) or "one device"
        rate = c.tokens_per_second / topology.num_devices
        times = seconds(c.compute_seconds), seconds(c.link_seconds)
        table.add_row(mesh, c.program.remat, str(c.program.batch), gib(c.needed), *times, f"{rate:,.0f}")
    out = console()
    out.print(table)
    out.print(
        f"{len(fitting)} of {len(found)} fit with a margin of {MARGIN - 1:.0%}. Memory is the compiler's early "
        "estimate; times are formulas at the chip's peak, so compile the one you choose without --search."
    )
    return 0 if fitting else 1


def _plain(candidate: Candidate, topology: Topology) -> dict[str, Any]:
    rates = {"tokens_per_second": candidate.tokens_per_second, "fits": fits(candidate, topology)}
    return dataclasses.asdict(candidate) | rates
