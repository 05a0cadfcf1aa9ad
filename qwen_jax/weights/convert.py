"""`qwen-jax convert`: any checkpoint to our Orbax format, to a Hugging Face folder or to GGUF."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from qwen_jax.local_path import LocalPath

if TYPE_CHECKING:
    from qwen_jax.weights.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Convert a checkpoint, streaming: memory stays small whatever the model's size."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """'default', a folder (safetensors, .bin, Orbax), a .gguf file, or a Hugging Face id."""
    dst: Annotated[LocalPath, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder, or for GGUF the file, to write; it must not exist yet."""
    to: Literal["orbax", "hf", "gguf"] = "orbax"
    """Our Orbax checkpoint, a Hugging Face folder with safetensors, or one .gguf file (`quantize` makes small ones)."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """Cast every weight; by default each keeps its dtype, and GGUF becomes bfloat16."""
    adapter: LocalPath | None = None
    """A PEFT folder whose adapter is added, each sum in float32; the logits' difference from the adapter as trained,
    over the base that it names if that is here and else over SRC, is printed."""


def main(args: Sequence[str]) -> int:
    """Runs `qwen-jax convert` with its arguments. Raises InputError on bad input."""
    options = tyro.cli(Arguments, args=list(args), prog="qwen-jax convert")

    import ml_dtypes
    import numpy as np

    from qwen_jax.errors import InputError
    from qwen_jax.weights.open import open_checkpoint

    if options.dst.exists():  # before a source may have to be downloaded
        raise InputError(f"{options.dst} already exists; choose another folder, or remove it first.")
    checkpoint, trained = open_checkpoint(options.src), None
    if options.adapter:
        from qwen_jax.weights.peft import MergedCheckpoint, read_adapter, trained_base

        adapter = read_adapter(options.adapter, checkpoint.config)
        trained = MergedCheckpoint(trained_base(options.adapter, checkpoint), adapter)
        checkpoint = MergedCheckpoint(checkpoint, adapter)
    dtype = None
    if options.dtype:
        dtype = np.dtype(ml_dtypes.bfloat16 if options.dtype == "bfloat16" else options.dtype)
    if options.to == "orbax":
        from qwen_jax.weights.orbax import save_orbax

        save_orbax(checkpoint, options.dst, dtype=dtype)
    elif options.to == "hf":
        from qwen_jax.weights.export import save_hf

        save_hf(checkpoint, options.dst, dtype=dtype)
    else:
        from qwen_jax.weights.gguf_export import GgufType, save_gguf, warn_of_unsaid

        types: dict[str | None, GgufType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", None: "bf16"}
        save_gguf(checkpoint, options.dst, types[options.dtype])
        warn_of_unsaid(checkpoint.config)
    print(f"{options.src} -> {options.dst} ({options.to})")
    if trained is not None:
        _say_difference(open_checkpoint(options.dst), trained)
    return 0


def _say_difference(merged: Checkpoint, trained: Checkpoint) -> None:
    import numpy as np

    from qwen_jax.one_layer import logit_difference

    tokens = np.random.default_rng(0).integers(0, merged.config.vocab_size, (1, 128), np.int32)
    found = logit_difference(merged, trained, tokens)
    print(
        f"logits after {found.tokens} random tokens, beside the adapter over {trained.source} in float32: at most "
        f"{found.largest:.2g} and in the mean {found.mean:.2g} apart, where the largest is {found.largest_logit:.3g}; "
        f"the likeliest token is the same after {100 * found.agreement:.1f} %"
    )
