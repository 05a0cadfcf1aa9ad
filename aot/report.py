"""What is known of a compiled program: memory, FLOPs, collectives and times, and how it is shown."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from aot.census import Census
from aot.chips import GIB, Topology
from aot.memory import Allocation, Memory, OutOfMemory
from aot.programs import Program
from qwen_jax import flops

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(frozen=True)
class Report:
    """A program and what the compiler made of it; either `memory` and `census`, or `out_of_memory`.

    All figures are of one chip (of tpu7x, one JAX device).
    """

    program: Program
    topology: Topology
    memory: Memory | None
    census: Census | None
    out_of_memory: OutOfMemory | None
    copies: tuple[Allocation, ...]  # temporaries that are a layer's cache, or an int8 matrix, once more
    lower_seconds: float
    compile_seconds: float
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        return self.memory is not None

    @property
    def needed(self) -> int:
        """Bytes of HBM that the program takes, or would."""
        if self.out_of_memory:
            return self.out_of_memory.needed
        return self.memory.total if self.memory else 0

    @property
    def model_flops(self) -> float:
        """What the step needs, by formula."""
        program = self.program
        total = flops.model_flops(
            program.config, program.step, program.batch, program.sequence, frozen=bool(program.adapter)
        )
        return total / self.num_devices

    @property
    def num_devices(self) -> int:
        return self.topology.num_devices

    @property
    def model_share(self) -> float:
        """Model FLOPs over the FLOPs that the program runs, which recomputes."""
        return self.model_flops / self.census.flops if self.census and self.census.flops else 0.0

    @property
    def step_seconds(self) -> float:
        """The longer of compute and HBM, each at its peak, and the links that neither hides: no step is shorter."""
        exposed = self.census.exposed_seconds if self.census else 0.0
        return max(self.compute_seconds, self.hbm_seconds) + exposed

    @property
    def mfu_ceiling(self) -> float:
        """The model's FLOPs at the chip's peak, over `step_seconds`."""
        return self.model_flops / self.topology.chip.peak_flops / self.step_seconds if self.step_seconds else 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the whole slice in one step."""
        return self.program.batch * (1 if self.program.step == "decode" else self.program.sequence)

    @property
    def compute_seconds(self) -> float:
        """The program's FLOPs at the chip's peak."""
        return self.census.flops / self.topology.chip.peak_flops if self.census else 0.0

    @property
    def hbm_seconds(self) -> float:
        """The program's HBM traffic at the published bandwidth."""
        return self.census.hbm_bytes / self.topology.chip.hbm_bandwidth if self.census else 0.0

    @property
    def least_hbm_bytes(self) -> float:
        """What a step must read: its arguments, but for an embedding of which it reads rows."""
        config, mesh = self.program.config, dict(self.program.mesh)
        looked_up = 0 if config.tie_word_embeddings else 2 * flops.head_params(config) / mesh.get("tensor", 1)
        return (self.memory.arguments if self.memory else 0) - looked_up

    @property
    def link_seconds(self) -> float:
        return self.census.link_seconds if self.census else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes that all chips together send for each token."""
        return self.census.bytes_sent * self.num_devices / self.tokens if self.census else 0.0

    @property
    def problems(self) -> list[str]:
        """What a good program does not do; empty for one that fits and has nothing of it."""
        if self.census is None:
            return [f"does not fit: {gib(self.needed)} of {gib(self.topology.chip.hbm_bytes)} GiB"]
        found = []
        if self.program.step == "train":
            for name, needed in (("links", self.link_seconds), ("HBM", self.hbm_seconds)):
                if needed > self.compute_seconds:
                    found.append(
                        f"more time for {name}, {seconds(needed)}, than for compute, {seconds(self.compute_seconds)}"
                    )
            reduced, scattered = (self.census.over(kind, "fsdp") for kind in ("all-reduce", "reduce-scatter"))
            scattered += self.census.over("collective-permute", "fsdp")
            if reduced > 0.25 * (reduced + scattered):
                found.append(f"{reduced / 1e9:.2f} GB of all-reduces over fsdp, where gradients could be scattered")
        if self.copies:
            size = sum(copy.num_bytes for copy in self.copies)
            copy = f"{self.copies[0].shape} of {short_name(self.copies[0].name)}"
            found.append(f"{gib(size)} GiB of the cache or of few-bit weights are in memory twice, such as {copy}")
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything, for `--json`; sizes in bytes, times in seconds."""
        result: dict[str, Any] = {
            "program": dataclasses.asdict(self.program) | {"mesh": dict(self.program.mesh)},
            "topology": self.topology.name,
            "chips": self.topology.num_chips,
            "fits": self.fits,
            "hbm_capacity": self.topology.chip.hbm_bytes,
            "model_flops": self.model_flops,
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            "versions": self.versions,
            "problems": self.problems,
        }
        if self.out_of_memory:
            result["out_of_memory"] = dataclasses.asdict(self.out_of_memory) | {"sentence": refusal(self)}
        if self.memory and self.census:
            result |= {
                "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total},
                "census": dataclasses.asdict(self.census) | {"kernels": dict(self.census.kernels)},
                "model_share": self.model_share,
                "mfu_ceiling": self.mfu_ceiling,
                "step_seconds": self.step_seconds,
                "compute_seconds": self.compute_seconds,
                "hbm_seconds": self.hbm_seconds,
                "least_hbm_bytes": self.least_hbm_bytes,
                "link_seconds": self.link_seconds,
                "exposed_link_seconds": self.census.exposed_seconds,
                "bytes_sent_per_token": self.bytes_per_token,
            }
        return result


# --- Out of memory ----------------------------------------------------------------------------------------------------


def refusal(report: Report) -> str:
    """One sentence: how much memory is missing, the largest allocations, and which settings would help."""
    assert report.out_of_memory
    oom = report.out_of_memory
    missing = oom.needed - oom.available
    text = (
        f"{'about ' if oom.early else ''}{missing / GIB:.2f} GiB of HBM are missing on each chip "
        f"({oom.needed / GIB:.2f} GiB of {oom.available / GIB:.2f} GiB)"
    )
    if oom.allocations:
        named = [f"{a.num_bytes / GIB:.2f} GiB {a.shape} of {short_name(a.name)}" for a in oom.allocations[:3]]
        text += f"; the largest allocations are {', '.join(named)}"
    return f"{text}; what would help: {', or '.join(advice(report.program))}."


def advice(program: Program) -> list[str]:
    """Settings that take less memory, the cheapest in speed first."""
    mesh = dict(program.mesh)
    shards = mesh.get("fsdp", 1) * mesh.get("tensor", 1) * mesh.get("context", 1) * mesh.get("expert", 1)
    rows = program.batch // max(mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("expert", 1), 1)
    found = []
    if program.step == "train":
        if program.remat not in ("full", "offload"):
            found.append("--remat full")
        if rows > program.accumulate:
            found.append(f"--accumulate {program.accumulate * 2}")
        if rows <= 1:
            found.append("a mesh with more tensor or context, which cut the activations")
        if program.moments == "float32" and not program.adapter:
            found.append("--moments bfloat16")
        if program.remat == "full":
            found.append("--remat offload")
    else:
        if program.weights == "bfloat16":
            found += ["--weights int8", "--weights int4"]
        if program.cache_dtype == "bfloat16":
            found.append("--cache-dtype int8")
        if program.step == "decode":
            found.append("a smaller --batch or --sequence, which the cache grows with")
        found.append("a mesh with more tensor")
    if mesh.get("data", 1) > 1:
        found.append(f"fsdp instead of data={mesh['data']}")
    found.append(f"more chips than the {shards} that share the weights" if shards > 1 else "more chips")
    return found


def short_name(op_name: str) -> str:
    """The telling part of an operation's path or an argument's name: `jit(step)/while/body/mlp/gate/dot_general` ->
    `mlp/gate/dot_general`, `params['embed']['embedding']` -> `params/embed/embedding`."""
    skipped = (
        "jit(",
        "jvp(",
        "transpose(",
        "while",
        "body",
        "closed_call",
        "checkpoint",
        "rematted_computation",
        "vmap(",
    )
    parts = [part for part in op_name.split("/") if not part.startswith(skipped)]
    name = "/".join(parts[-3:]) or op_name
    return re.sub(r"\['?([^\]']*)'?\]", r"/\1", name)


# --- For people -------------------------------------------------------------------------------------------------------


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


def seconds(value: float) -> str:
    """A time with three digits: `1.23 s`, `45.6 ms`, `789 us`."""
    if value >= 1:
        return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def print_report(report: Report, console: Console) -> None:
    """The whole report as text and a table of collectives."""
    from rich.table import Table

    program, topology = report.program, report.topology
    mesh = ", ".join(f"{axis}={size}" for axis, size in program.mesh) or "one device"
    console.print(
        f"[bold]{program.model}[/] {program.step}, batch {program.batch}, sequence {program.sequence}, {mesh}"
    )
    cloud = "" if topology.chip.is_gpu else f" (Cloud's accelerator type {topology.accelerator_type})"
    console.print(f"chips        {topology.num_chips} in {topology.name}{cloud}")
    capacity = gib(topology.chip.hbm_bytes)
    if report.memory is None or report.census is None:
        console.print(f"memory       does not fit {capacity} GiB: {refusal(report)}")
        return
    memory, census = report.memory, report.census
    share = memory.total / topology.chip.hbm_bytes
    parts = {"arguments": memory.arguments, "temporaries": memory.temporaries, "code": memory.code}
    parts |= {"outputs": memory.outputs} if memory.outputs > 2**20 else {}
    host = f", and {gib(memory.host)} GiB of host memory" if memory.host else ""
    console.print(
        f"memory       {gib(memory.total)} of {capacity} GiB a chip ({share:.0%}): "
        + " + ".join(f"{gib(size)} {name}" for name, size in parts.items())
        + host
    )
    console.print(
        f"FLOPs        model {report.model_flops / 1e12:.4g} T a chip, program {census.flops / 1e12:.4g} T "
        f"({report.model_share:.0%})"
    )
    limits = {"compute": report.compute_seconds, "HBM": report.hbm_seconds, "links": report.link_seconds}
    slowest = max(limits, key=lambda name: limits[name])
    console.print(
        "roofline     " + ", ".join(f"{name} {seconds(value)}" for name, value in limits.items()) + f": {slowest} bound"
    )
    floor = census.compute_seconds + census.exposed_seconds
    console.print(
        f"step         at least {seconds(report.step_seconds)}, of which {seconds(census.exposed_seconds)} waiting for "
        f"links: MFU at most {report.mfu_ceiling:.0%}, "
        f"{report.tokens / report.step_seconds / report.num_devices:,.0f} tokens/s a chip; "
        f"{seconds(floor)} if no operation overlaps another"
    )
    if census.estimated_seconds:
        console.print(
            f"estimate     the compiler's cycle count gives {seconds(census.estimated_seconds)} without kernels and "
            "links (matrix products 1.0 to 1.4 times the roofline, elementwise work 3 to 4 times)"
        )
    if census.unpriced_kernels:
        console.print(
            f"kernels      {census.unpriced_kernels} runs of kernels that declare no cost are in none of these"
        )
    console.print(
        f"compile      {report.compile_seconds:.0f} s after {report.lower_seconds:.0f} s of tracing, with "
        + ", ".join(f"{name} {version}" for name, version in report.versions.items())
    )
    for problem in report.problems:
        console.print(f"[bold red]problem[/]      {problem}")
    if not census.collectives:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("collective", no_wrap=True)
    table.add_column("over", no_wrap=True)
    for heading in ("count", "GB sent", "link time", "under compute"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("largest", no_wrap=True)
    for c in census.collectives:
        hidden = f"{c.hidden_seconds / c.link_seconds:.0%}" if c.link_seconds else ""
        numbers = f"{c.count:,}", f"{c.bytes_sent / 1e9:.3f}", seconds(c.link_seconds), hidden
        table.add_row(c.kind, " ".join(c.axes), *numbers, f"{c.largest} {short_name(c.source)}".rstrip())
    console.print(table)


def console() -> Console:
    """Standard output, wide enough for whole rows where it is not a terminal."""
    from rich.console import Console

    out = Console(highlight=False)
    return out if out.is_terminal else Console(width=200, highlight=False)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is being done and since when: one changing line, or in a pipe one line each."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    out = Console(stderr=True)
    if not out.is_terminal:
        started = time.monotonic()
        yield lambda stage: out.print(f"{time.monotonic() - started:5.0f} s  {stage}", markup=False, highlight=False)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda stage: bar.update(task, description=stage)
