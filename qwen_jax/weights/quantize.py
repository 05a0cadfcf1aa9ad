"""`qwen-jax quantize`: any checkpoint in fewer bits, for the tools that people run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from qwen_jax.local_path import LocalPath


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a checkpoint in fewer bits and print what rounding did to each kind of matrix.

    GGUF files run in llama.cpp and Ollama, and here. `qwen-jax eval perplexity` says what the loss means.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """'default', a folder (safetensors, .bin, Orbax), a .gguf file, or a Hugging Face id."""
    dst: Annotated[LocalPath, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The .gguf file to write; it must not exist yet."""
    to: Literal["gguf-q8_0", "gguf-q6_k", "gguf-q4_k_m", "gguf-q4_0"] = "gguf-q4_k_m"
    """llama.cpp's kinds: about 8.5, 6.6, 4.8 and 4.5 bits for each weight."""


def main(args: Sequence[str]) -> int:
    """Runs `qwen-jax quantize` with its arguments. Raises InputError on bad input."""
    options = tyro.cli(Arguments, args=list(args), prog="qwen-jax quantize")

    from rich.console import Console
    from rich.table import Table

    from qwen_jax.weights.gguf_export import GGUF_TYPES, GgufType, save_gguf, warn_of_unsaid
    from qwen_jax.weights.open import open_checkpoint

    kinds: dict[str, GgufType] = {f"gguf-{kind}": kind for kind in GGUF_TYPES}
    checkpoint = open_checkpoint(options.src)
    lost = save_gguf(checkpoint, options.dst, kinds[options.to])
    table = Table("matrices", "stored as", "relative error", title=f"{options.src} as {options.to}", box=None)
    table.columns[2].justify = "right"
    for row in lost:
        if row.relative:
            table.add_row(row.kind, row.formats, f"{row.relative:.2e}")
    Console().print(table)
    num_bytes, num_params = options.dst.stat().st_size, checkpoint.config.num_params()
    print(f"{options.dst}: {num_bytes:,} bytes, {8 * num_bytes / num_params:.2f} bits for each parameter")
    warn_of_unsaid(checkpoint.config)
    return 0
