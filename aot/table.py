"""The table of docs/tpu.md: what we train and decode on which slice, compiled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from aot import experiments
from aot.chips import parse_topology
from aot.programs import CacheDtype, Kind, Program
from aot.report import Report, gib, seconds


def train(model: str, target: str, batch: int, sequence: int, **settings: int | str) -> Program:
    """A training program; settings are mesh axes and fields of Program."""
    names = ("remat", "moments", "accumulate", "weights", "adapter")
    others = {name: settings.pop(name) for name in names if name in settings}
    mesh = tuple((axis, int(size)) for axis, size in settings.items())
    return Program(model, target, "train", batch, sequence, mesh, **others)  # type: ignore[arg-type]


def decode(
    model: str,
    target: str,
    batch: int,
    slots: int,
    weights: Kind,
    tensor: int = 1,
    cache_dtype: CacheDtype = "bfloat16",
) -> Program:
    """A decode step with a cache of so many slots a row."""
    mesh = (("tensor", tensor),) if tensor > 1 else ()
    return Program(model, target, "decode", batch, slots, mesh, weights=weights, cache_dtype=cache_dtype)


# what docs/tpu.md compares generations and lengths by, besides the experiments of configs/
TRAINING = (
    train("qwen2.5-7b", "v5e-16", 16, 4096, fsdp=16),
    train("qwen2.5-7b", "v6e-8", 64, 4096, fsdp=8),
    train("qwen2.5-7b", "v5p-8", 16, 4096, fsdp=8, remat="minimal"),
)

# caches of 4096 slots a row, and on one v5e, where those do not fit, the next smaller power of two that does
DECODING = (
    decode("qwen2.5-7b", "v5e-1", 1, 4096, "bfloat16"),
    decode("qwen2.5-7b", "v5e-1", 8, 2048, "bfloat16"),
    decode("qwen2.5-7b", "v5e-1", 64, 256, "bfloat16"),
    decode("qwen2.5-7b", "v5e-1", 1, 4096, "int8"),
    decode("qwen2.5-7b", "v5e-1", 8, 4096, "int8"),
    decode("qwen2.5-7b", "v5e-1", 64, 2048, "int8"),
    *(decode("qwen2.5-7b", "v5e-1", batch, 4096, "int4") for batch in (1, 8, 64)),
    *(decode("qwen2.5-7b", "v5e-1", 1, 32768, weights, cache_dtype="int8") for weights in ("int8", "int4")),
    decode("qwen2.5-7b", "v5e-1", 8, 32768, "int4", cache_dtype="int8"),
    *(decode("qwen2.5-7b", "v6e-1", batch, 4096, "int4") for batch in (1, 8, 64)),
    decode("qwen2.5-7b", "v6e-1", 8, 32768, "int4", cache_dtype="int8"),
    *(
        decode("qwen2.5-7b", target, batch, 4096, weights, tensor)
        for target, tensor in (("v5e-4", 4), ("v6e-1", 1))
        for weights in ("bfloat16", "int8")
        for batch in (1, 8, 64)
    ),
    decode("qwen2.5-72b", "v5e-16", 8, 4096, "bfloat16", 16),
    decode("qwen2.5-72b", "v5e-16", 8, 4096, "int8", 16),
)


def _like(name: str) -> str:
    """A model of Llama's dimensions in Qwen's form, which adds biases to q, k and v."""
    return str(Path(__file__).with_name(f"{name}.json"))


# LoRA of rank 16 over a frozen 7B in 4 bits, at 2,048 tokens
ADAPTERS = tuple(
    train("qwen2.5-7b", target, 4 * fsdp, 2048, fsdp=fsdp, weights=weights, adapter=16, accumulate=2)
    for target, fsdp in (("v5e-1", 1), ("v5e-4", 4))
    for weights in ("int4", "nf4")
)

# A copy of the model on each slice; as many rows a chip as on one.
_ON_HOST = "residual@host,q@host,k@host,v@host,attention@host,o@host"
SLICES = (
    train("qwen2.5-72b", "2 x v5e-256", 256, 4096, data=2, fsdp=128, tensor=2, remat=_ON_HOST),
    train("qwen2.5-72b", "4 x v5p-128", 512, 4096, data=4, fsdp=64, tensor=2, remat="minimal"),
)

# MaxText's published settings: benchmarks/maxtext_trillium_model_configs.py (llama3_1_8b_8192: 4 rows a chip, FSDP, the
# layer's input and q, k, v and o offloaded) and src/maxtext/configs/tpu/v5p/llama2_70b.sh (4 rows a chip, FSDP,
# save_dot_except_mlpwi), whose v5p-512 counts cores: 256 chips.
PEERS = (
    train(_like("llama3.1-8b"), "v6e-8", 32, 8192, fsdp=8, remat="residual@host,q@host,k@host,v@host,o@host"),
    train(_like("llama2-70b"), "v5p:4x8x8", 1024, 4096, fsdp=256, remat="q,k,v,o,down"),
    train(_like("llama2-70b"), "v5p:4x8x8", 1024, 4096, data=2, fsdp=32, tensor=4, remat="q,k,v,o,down"),
)


def sections() -> dict[str, Sequence[Program]]:
    """The tables, by title."""
    return {
        "Experiments": experiments.programs(),
        "Training": TRAINING,
        "Adapters over few bits": ADAPTERS,
        "Several slices": SLICES,
        "Decoding": DECODING,
        "Beside MaxText": PEERS,
    }


def main(*, as_json: bool) -> int:
    """Prints the tables; exit status 1 when a row does not fit."""
    reports = {name: compile_rows(programs, name) for name, programs in sections().items()}
    if as_json:
        print(json.dumps({name: [r.as_json() for r in rows] for name, rows in reports.items()}, indent=2))
    else:
        print(markdown(reports))
    return 1 if any(not report.fits for rows in reports.values() for report in rows) else 0


def compile_rows(programs: Sequence[Program], title: str) -> list[Report]:
    """Reports of all programs, from the cache or compiled now, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    from aot.compiler import Compiler

    reports = []
    with Progress(console=Console(stderr=True)) as bar, Compiler() as compiler:
        task = bar.add_task(title, total=len(programs))
        for program in programs:
            name = f"{title}: {label(program)} on {program.target}"
            report = compiler(program, say=lambda stage, name=name: bar.update(task, description=f"{name}, {stage}"))
            reports.append(report)
            bar.advance(task)
    return reports


def label(program: Program) -> str:
    """The model's name, also of one that is a file."""
    return Path(program.model).stem if program.model.endswith(".json") else program.model


def markdown(reports: dict[str, list[Report]]) -> str:
    """The sections as Markdown tables."""
    parts = []
    for name, rows in reports.items():
        versions = ", ".join(sorted({f"{k} {v}" for report in rows for k, v in report.versions.items()}))
        head, lines = (_DECODE_HEAD, map(_decode_line, rows)) if name == "Decoding" else (_TRAIN_HEAD, map(_line, rows))
        rule = "|".join("---" if i < 3 else "---:" for i in range(len(head)))
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts.append(f"### {name}\n\n| {' | '.join(head)} |\n|{rule}|\n{table}\n\n{versions}.")
    return "\n\n".join(parts)


_TRAIN_HEAD = (
    *("model", "slice (chips)", "mesh", "rows", "tokens", "remat", "GiB a chip", "model FLOPs", "compute", "HBM"),
    *("links", "exposed", "MFU at most"),
)
_DECODE_HEAD = (
    *("model", "slice", "mesh", "weights", "rows", "cache", "GiB a chip", "temporaries", "stored and read, GB"),
    *("program's bytes / these", "HBM time", "links", "tokens/s at most"),
)


def _common(report: Report) -> tuple[str, str, str, str]:
    program, topology = report.program, parse_topology(report.program.target)
    mesh = " ".join(f"{axis}={size}" for axis, size in program.mesh) or "1"
    return label(program), f"{topology.name} ({topology.num_chips})", mesh, gib(topology.chip.hbm_bytes)


def _line(report: Report) -> list[str]:
    model, where, mesh, capacity = _common(report)
    program = report.program
    rows = f"{program.accumulate} x {program.batch // program.accumulate}" if program.accumulate > 1 else program.batch
    model = f"{model}, LoRA {program.adapter} over {program.weights}" if program.adapter else model
    cells = [model, where, mesh, str(rows), f"{program.sequence:,}", program.remat]
    memory, census = report.memory, report.census
    if memory is None or census is None:
        return [*cells, f"**{gib(report.needed)}** of {capacity}: does not fit", *[""] * 6]

    def marked(time: float) -> str:
        """In bold what takes longer than the compute."""
        return f"**{seconds(time)}**" if time > report.compute_seconds else seconds(time)

    return [
        *cells,
        f"{gib(memory.total)} of {capacity}",
        f"{report.model_share:.0%}",
        seconds(report.compute_seconds),
        marked(report.hbm_seconds),
        marked(report.link_seconds),
        seconds(census.exposed_seconds),
        f"{report.mfu_ceiling:.0%}",
    ]


def _decode_line(report: Report) -> list[str]:
    model, where, mesh, capacity = _common(report)
    program = report.program
    cache = f"{program.sequence:,} {program.cache_dtype}"
    cells = [model, where, mesh, program.weights, str(program.batch), cache]
    memory, census = report.memory, report.census
    if memory is None or census is None:
        return [*cells, f"**{gib(report.needed)}** of {capacity}: does not fit", *[""] * 6]
    bound = max(report.hbm_seconds, report.compute_seconds) + report.link_seconds
    return [
        *cells,
        f"{gib(memory.total)} of {capacity}",
        gib(memory.temporaries),
        f"{report.least_hbm_bytes / 1e9:.2f}",
        f"{census.hbm_bytes / report.least_hbm_bytes:.2f}",
        *map(seconds, (report.hbm_seconds, report.link_seconds)),
        f"{program.batch / bound:,.0f}",
    ]
