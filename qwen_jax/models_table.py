"""`qwen-jax models`: what each released checkpoint is and what it costs in memory."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable

import tyro

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.presets import load_preset, preset_names

GROUP = 128
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Models:
    """Lists the released checkpoints that are known by name, with their size and memory.

    bf16 counts two bytes per parameter. int8 and int4 quantise the layers' matrices, the experts' included: 1 or 1/2
    byte per weight and one float16 scale per 128 weights along a matrix's input; embedding, head, biases, norms and
    the MoE router stay bf16. KV/token is the bf16 cache of one token in all layers, in bytes.
    """

    filter: tyro.conf.Positional[str] = ""
    """only models whose name contains this"""
    json: bool = False
    """print a JSON list; memory in bytes"""


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One line of the table; memory is of the weights alone, in bytes."""

    name: str
    params: int
    active_params: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    bf16_bytes: int
    int8_bytes: int
    int4_bytes: int
    kv_bytes_per_token: int


def quantised_bytes(config: ModelConfig, bits: int) -> int:
    """Bytes of the weights when only the layers' matrices are quantised, the experts' included.

    A matrix [out, in] takes out * in * bits / 8 bytes and one float16 scale per GROUP weights along `in` (symmetric,
    so no zero points). Embedding, head, biases, norms and the MoE router stay in bfloat16.
    """
    matrices = list(_layer_matrices(config))
    weights = config.num_layers * sum(out * width for out, width in matrices)
    scales = config.num_layers * sum(out * -(-width // GROUP) for out, width in matrices)
    return weights * bits // 8 + 2 * scales + 2 * (config.num_params() - weights)


def _layer_matrices(config: ModelConfig) -> Iterable[tuple[int, int]]:
    """(out, in) of every matrix of one layer that is quantised."""
    d, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield from ((queries, d), (keys, d), (keys, d), (d, queries))
    if config.moe:
        shared = (config.moe.shared_intermediate_size,) if config.moe.shared_intermediate_size else ()
        widths = (config.moe.expert_intermediate_size,) * config.moe.num_experts + shared
    else:
        widths = (config.intermediate_size,)
    for width in widths:
        yield from ((width, d), (width, d), (d, width))


def model_row(name: str) -> ModelRow:
    """The table's line for preset `name`."""
    config = load_preset(name)
    return ModelRow(
        name=name,
        params=config.num_params(),
        active_params=config.num_active_params(),
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        bf16_bytes=2 * config.num_params(),
        int8_bytes=quantised_bytes(config, 8),
        int4_bytes=quantised_bytes(config, 4),
        kv_bytes_per_token=config.kv_bytes_per_token(),
    )


def print_table(rows: Iterable[ModelRow]) -> None:
    """Prints the rows aligned, memory in GiB."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    numbers = "params active layers heads head_dim context bf16 int8 int4 KV/token"
    for title in numbers.split():
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        memory = [f"{size / GIB:.2f}" for size in (row.bf16_bytes, row.int8_bytes, row.int4_bytes)]
        active = f"{row.active_params / 1e9:.2f}B" if row.active_params != row.params else "all"
        heads = f"{row.num_heads}/{row.num_kv_heads}"
        sizes = [f"{row.params / 1e9:.2f}B", active, str(row.num_layers), heads, str(row.head_dim)]
        table.add_row(row.name, *sizes, f"{row.max_position_embeddings:,}", *memory, f"{row.kv_bytes_per_token:,}")
    console = Console()
    if not console.is_terminal:  # a pipe gets whole rows, not rows cut at 80 columns
        console = Console(width=200)
    console.print(table)
    console.print(
        "heads: query/key-value. Memory: GiB of weights. KV/token: bytes of bf16 cache per token.", style="dim"
    )


def main(argv: list[str]) -> int:
    """The subcommand `models`. Raises InputError when no model's name contains the filter."""
    options = tyro.cli(Models, args=argv, prog="qwen-jax models", config=(tyro.conf.FlagCreatePairsOff,))
    names = [name for name in preset_names() if options.filter.lower() in name]
    if not names:
        raise InputError(f"no model's name contains {options.filter!r}; `qwen-jax models` lists them all.")
    rows = sorted(map(model_row, names), key=lambda row: (_family(row.name), row.params, row.name))
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        print_table(rows)
    return 0


def _family(name: str) -> str:
    """What stands before the size: qwen2.5-coder-7b-instruct -> qwen2.5-coder."""
    return name[: match.start()] if (match := re.search(r"-\d[\d._]*b|-moe", name)) else name
