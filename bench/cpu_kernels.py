"""`python -m bench.cpu_kernels`: the C kernels' products as a share of what memory delivers to the same threads.

Every figure is of a chain of products with different matrices, 250 MB in all, so that none is in a cache, beside a
chain that only reads as many bytes. Both run in turn, and the least time of each counts: the machine may be shared.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from qwen_jax.kernels.native import GGUF_INPUTS, Library, Strips, builder

SHAPES = ((4864, 1024), (1024, 4864), (151936, 896))
BYTES = 250e6


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Bytes of weights a second of the C kernels, as a share of what memory delivers."""

    formats: tuple[str, ...] = (*GGUF_INPUTS, "INT4")
    rows: tuple[int, ...] = (1, 2, 4, 8)
    repetitions: int = 12
    """Chains of each; the fastest counts."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Arguments, args=argv, prog="python -m bench.cpu_kernels")
    builder.SOURCE = Path(__file__).with_name("stream.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Library(builder.build(Path(folder), lambda path: None), "bench_")
    handler = jax.ffi.pycapsule(library.functions.qwen_stream)
    jax.ffi.register_ffi_target("bench_qwen_stream", handler, platform="cpu")
    print(library.isa)
    rng = np.random.default_rng(0)
    for out, inputs in SHAPES:
        for format in options.formats:
            if inputs % GGUF_INPUTS.get(format, 128):
                continue
            weights = _weights(library, format, out, inputs, rng)
            arrays = [weight.strips.reshape(-1) for weight in weights]
            num_bytes = sum(array.nbytes for array in arrays)
            cells = []
            for rows in options.rows:
                x = jnp.asarray(rng.standard_normal((rows, inputs)), jnp.float32)
                products, reads = _products(library, weights, x), _reads(arrays)
                taken, read = _least([products, reads], options.repetitions)
                cells.append(
                    f"{rows} rows {num_bytes / taken / 1e9:5.1f} = {read / taken:4.2f} of {num_bytes / read / 1e9:4.1f}"
                )
            print(f"{format:5} {out:6} x {inputs:<5}", "  ".join(cells), flush=True)
    return 0


def _weights(library: Library, format: str, out: int, inputs: int, rng: np.random.Generator) -> list[Strips]:
    if format in GGUF_INPUTS:
        import gguf

        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]][1]
        count, group = inputs // GGUF_INPUTS[format], GGUF_INPUTS[format] // 32
        one = library.pack_gguf(rng.integers(0, 255, (out, count, size), np.uint8), format)
    else:
        group = 4
        scale = np.ones((out, inputs // 128), np.float32)
        one = library.pack_groups(rng.integers(0, 16, (out, inputs), np.int8), scale, scale, format)
    copies = max(1, round(BYTES / one.nbytes))
    return [Strips(jnp.array(one, copy=True), format, group) for _ in range(copies)]


def _products(library: Library, weights: list[Strips], x: jax.Array) -> Callable[[], jax.Array]:
    @jax.jit
    def chain(x: jax.Array, strips: list[jax.Array]) -> jax.Array:
        total = jnp.zeros(())
        for weight, array in zip(weights, strips, strict=True):  # each waits for the one before
            total = library.matmul(jnp.where(total == 1, 2.0, x), [weight._replace(strips=array)])[0][0, 0]
        return total

    return lambda: chain(x, [weight.strips for weight in weights])


def _reads(arrays: list[jax.Array]) -> Callable[[], jax.Array]:
    @jax.jit
    def chain(arrays: list[jax.Array]) -> jax.Array:
        total = jnp.zeros(16, jnp.uint32)
        for array in arrays:
            total = jax.ffi.ffi_call("bench_qwen_stream", jax.ShapeDtypeStruct((16,), jnp.uint32))(array, total)
        return total

    return lambda: chain(arrays)


def _least(programs: Sequence[Callable[[], jax.Array]], repetitions: int) -> list[float]:
    for program in programs:
        program().block_until_ready()
    least = [float("inf")] * len(programs)
    for _ in range(repetitions):
        for i, program in enumerate(programs):
            began = time.perf_counter()
            program().block_until_ready()
            least[i] = min(least[i], time.perf_counter() - began)
    return least


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
