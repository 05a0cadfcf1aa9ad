"""`make tpu-check`: programs compiled for three generations of TPU need no more memory, FLOPs and traffic than before.

The figures are in data/recorded.json; `python -m tests.aot.test_tpu` writes them anew, for a change that is
meant to alter them.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aot.compiler import Compiler
from aot.programs import Program
from aot.report import Report

RECORDED = Path(__file__).parent / "data" / "recorded.json"
MODEL = "qwen2.5-7b"
PROGRAMS = {
    "train v5e fsdp": Program(MODEL, "v5e-16", "train", 16, 4096, (("fsdp", 16),)),
    "train v6e fsdp tensor": Program(MODEL, "v6e-8", "train", 16, 4096, (("fsdp", 4), ("tensor", 2))),
    "train v5p experts": Program(
        "qwen2-57b-a14b", "v5p-64", "train", 64, 4096, (("data", 2), ("fsdp", 4), ("expert", 8))
    ),
    "prefill v5p tensor": Program(MODEL, "v5p:2x2x1", "prefill", 4, 2048, (("data", 2), ("tensor", 2))),
    "decode v5e int8": Program(MODEL, "v5e-1", "decode", 8, 4096, weights="int8"),
    "decode v6e tensor": Program(MODEL, "v6e-4", "decode", 8, 4096, (("data", 2), ("tensor", 2))),
}
# one FSDP axis over a whole 3-D torus: the compiler gathers and sums with all-reduces
TRAP = Program("qwen2.5-0.5b", "v5p:4x4x4", "train", 64, 1024, (("fsdp", 64),))
# a figure may be this much larger than the recorded one
TOLERANCE = 1.05

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the TPU compiler, is not installed: pip install 'qwen-jax[tpu]' (x86-64 Linux, no TPU needed)",
    ),
]


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as compiler:
        yield compiler


def figures(report: Report) -> dict[str, Any]:
    """What is recorded of a program, per chip."""
    assert report.memory and report.census, report.as_json()
    sent: dict[str, int] = {}
    for c in report.census.collectives:
        sent[f"{c.kind} {' '.join(c.axes)}"] = c.bytes_sent
    return {
        "memory": report.memory.total,
        "flops": report.census.flops,
        "hbm_bytes": report.census.hbm_bytes,
        "bytes_sent": sent,
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_grew(compiler: Compiler, name: str) -> None:
    report = compiler(PROGRAMS[name])
    now, recorded = figures(report), json.loads(RECORDED.read_text())[name]
    assert report.problems == []
    for figure in ("memory", "flops", "hbm_bytes"):
        assert now[figure] <= TOLERANCE * recorded[figure], figure
    for collective, size in now["bytes_sent"].items():
        # what is new may be a few numbers, such as a loss
        assert size <= max(TOLERANCE * recorded["bytes_sent"].get(collective, 0), 1e6), collective


def test_program_flops_are_the_models(compiler: Compiler) -> None:
    """With everything recomputed, a training step runs a forward pass more, the head's excepted."""
    for name in ("train v5e fsdp", "train v6e fsdp tensor"):
        assert 3 / 4 < compiler(PROGRAMS[name]).model_share < 0.9


def test_fsdp_over_a_whole_torus_is_caught(compiler: Compiler) -> None:
    report = compiler(TRAP)
    assert any("all-reduces over fsdp" in problem for problem in report.problems)


@pytest.mark.parametrize(("dtype", "short"), [("bfloat16", "bf16"), ("float32", "f32")])
def test_gradients_are_scattered_in_their_dtype(compiler: Compiler, tmp_path: Path, dtype: str, short: str) -> None:
    """Of two layers, whose matrices are larger than the table, over four chips."""
    experiment = tmp_path / "small.py"
    experiment.write_text(EXPERIMENT.format(dtype=dtype))
    report = compiler(Program(str(experiment), "v5e-4", "train", 4, 1024, (("fsdp", 4),), experiment=True))
    assert report.census
    sums = [c for c in report.census.collectives if c.kind in ("reduce-scatter", "all-reduce", "collective-permute")]
    assert max(sums, key=lambda c: c.bytes_sent).largest.startswith(f"{short}["), sums


EXPERIMENT = """
import dataclasses
from pathlib import Path
from qwen_jax.presets import load_preset
from train.config import TrainConfig
from train.data.config import DataConfig, SourceConfig
from train.step import StepConfig

small = dataclasses.replace(load_preset("qwen2.5-7b"), num_layers=2, vocab_size=1024)
data = DataConfig((SourceConfig("corpus:english"),), sequence_length=1024, batch_size=4)
config = TrainConfig(architecture=small, data=data, steps=10, step=StepConfig(gradient_dtype="{dtype}"), out=Path("x"))
"""


def record() -> None:
    """Writes the figures of all programs."""
    with Compiler() as compiler:
        found = {name: figures(compiler(program, say=print)) for name, program in PROGRAMS.items()}
    RECORDED.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    record()
