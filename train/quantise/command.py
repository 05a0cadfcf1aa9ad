"""`qwen-jax quantize`: any checkpoint in fewer bits, for the tools that people run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen_jax.local_path import LocalPath

if TYPE_CHECKING:
    from qwen_jax.weights.checkpoint import Checkpoint
    from train.quantise.kinds import FolderKind
    from train.quantise.layerwise import Loss

Kind = Literal[
    "gptq-int4", "gptq-int8", "awq-int4", "int8", "fp8", "gguf-q8_0", "gguf-q6_k", "gguf-q4_k_m", "gguf-q4_0"
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a checkpoint in fewer bits and print what that did to each kind of matrix.

    gptq-* and awq-int4: folders that vLLM, transformers and gptqmodel open, rounded so that outputs for a calibration
    text change least. int8 and fp8: the nearest numbers, in the folders of compressed-tensors (W8A8) and of Qwen3's FP8
    releases. gguf-*: a file that llama.cpp and Ollama run, of about 8.5, 6.6, 4.8 or 4.5 bits a weight. All of them
    open here. docs/quantisation.md says which kind is for which machine.

    Folders are made layer by layer, one layer in float32 at a time. Their loss is measured on text: the output error of
    each kind of matrix, and the perplexity of held-out text before and after.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """'default', a folder (safetensors, .bin, Orbax), a .gguf file, or a Hugging Face id."""
    dst: Annotated[LocalPath, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder or .gguf file to write; it must not exist yet."""
    to: Kind = "gguf-q4_k_m"
    """What to write."""
    calibration: tuple[str, ...] = ("python",)
    """Text files, UTF-8, or the names of corpora (`qwen-jax data` lists them); best what the model will read."""
    sequences: int | None = None
    """Of the calibration text; 128 for gptq and awq, and 8 for int8 and fp8, which it only measures."""
    length: int = 512
    """Tokens of a sequence."""
    group_size: Literal[32, 64, 128] = 128
    """Inputs that share a scale, for gptq and awq."""
    act_order: bool = False
    """For gptq: groups of inputs of like energy (desc_act), a little better and slower to run."""
    damping: float = 0.01
    """For gptq: what is added to the energy of each input, in parts of the mean."""
    mesh: str | None = None
    """Split each layer over all devices, for example `tensor=4`; default the first device alone."""


def main(args: Sequence[str]) -> int:
    """Runs `qwen-jax quantize` with its arguments. Raises InputError on bad input."""
    options = tyro.cli(Arguments, args=list(args), prog="qwen-jax quantize")
    match options.to:
        case "gptq-int4" | "gptq-int8" | "awq-int4" | "int8" | "fp8":
            return _folder(options, options.to)
        case _:
            return _gguf(options)


def _gguf(options: Arguments) -> int:
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
    _say_size(options, checkpoint, options.dst.stat().st_size)
    warn_of_unsaid(checkpoint.config)
    return 0


def _folder(options: Arguments, kind: FolderKind) -> int:
    from infer.progress import progress_bar
    from qwen_jax.errors import InputError
    from qwen_jax.sharding import MeshConfig, make_mesh
    from qwen_jax.weights.open import GgufCheckpoint, open_checkpoint
    from qwen_jax.weights.quantised_export import save_quantised
    from train.quantise.kinds import recipe
    from train.quantise.layerwise import Quantiser
    from train.quantise.text import sequences

    if options.dst.exists():  # before a source may have to be downloaded
        raise InputError(f"{options.dst} already exists; choose another folder, or remove it first.")
    number = options.sequences
    if number is None:
        number = 8 if kind in ("int8", "fp8") else 128
    if number < 1 or options.length < 2 or not 0 < options.damping < 1 or not options.calibration:
        raise InputError(
            "--sequences must be at least 1, --length at least 2, --damping between 0 and 1, and --calibration names "
            "at least one text."
        )
    checkpoint = open_checkpoint(options.src)
    if checkpoint.is_quantised:
        if not isinstance(checkpoint, GgufCheckpoint):
            raise InputError(
                f"{options.src} is quantised already; quantise the float weights that it was made of, or widen it "
                "first (qwen-jax convert --to hf)."
            )
        print(f"qwen-jax: {options.src} is rounded already, and is rounded once more.", file=sys.stderr)
    if options.length > checkpoint.config.context_length:
        raise InputError(
            f"--length {options.length} is beyond the model's context of {checkpoint.config.context_length}."
        )
    layout, method, fold = recipe(kind, checkpoint, options.group_size, options.act_order, options.damping)
    layout.check(checkpoint.config)
    mesh = None
    if options.mesh is not None:
        mesh = make_mesh(MeshConfig.parse(options.mesh), model=checkpoint.config)
    text = sequences(checkpoint.tokenizer(), options.calibration, number, options.length)
    quantiser = Quantiser(checkpoint, method, *text, fold=fold, mesh=mesh)
    with progress_bar("quantising", quantiser.total()) as advance:
        save_quantised(checkpoint, options.dst, layout, quantiser.layers(advance))
    _print_loss(options, quantiser.loss())
    _say_size(options, checkpoint, sum(file.stat().st_size for file in options.dst.glob("*.safetensors")))
    return 0


def _print_loss(options: Arguments, loss: Loss) -> None:
    from rich.console import Console
    from rich.table import Table

    headings = ("matrices", "output error", "worst layer", "which")
    table = Table(*headings, title=f"{options.src} as {options.to}, {' and '.join(options.calibration)}", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in loss.errors:
        table.add_row(row.kind, f"{row.relative:.3e}", f"{row.worst:.3e}", str(row.layer))
    console = Console()
    console.print(table)
    change = 100 * (loss.after / loss.before - 1)
    print(
        f"perplexity of {loss.tokens:,} held-out tokens in sequences of {options.length}: {loss.before:.4f} before, "
        f"{loss.after:.4f} after ({change:+.2f} %)"
    )


def _say_size(options: Arguments, checkpoint: Checkpoint, num_bytes: int) -> None:
    bits: Any = 8 * num_bytes / checkpoint.config.num_params()
    print(f"{options.dst}: {num_bytes:,} bytes, {bits:.2f} bits for each parameter")
