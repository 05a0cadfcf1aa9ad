"""What `qwen-jax quantize --to` can make: how a folder is laid out, and who rounds its matrices."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.quantised_export import FP8_BLOCK, Layout
from train.quantise import awq, methods
from train.quantise.gptq import gptq
from train.quantise.layerwise import Fold
from train.quantise.methods import Method

FolderKind = Literal["gptq-int4", "gptq-int8", "awq-int4", "int8", "fp8"]


class Recipe(NamedTuple):
    layout: Layout
    method: Method
    fold: Fold | None = None


def recipe(kind: FolderKind, checkpoint: Checkpoint, group: int, act_order: bool, damping: float) -> Recipe:
    match kind:
        case "gptq-int4" | "gptq-int8":
            layout = Layout("gptq", int(kind[-1]), group, act_order)
            how = {"bits": layout.bits, "group": group, "act_order": act_order, "damping": damping}
            return Recipe(layout, functools.partial(gptq, **how))
        case "awq-int4":
            layout = Layout("awq", 4, group)
            return Recipe(layout, functools.partial(awq.clipped, group=group), functools.partial(awq.fold, group=group))
        case "int8":
            return Recipe(Layout("int8"), methods.int8)
        case "fp8":
            layout = Layout("fp8", group=FP8_BLOCK)
            method = functools.partial(methods.fp8, block=FP8_BLOCK, dtype=layout.dtype(checkpoint))
            return Recipe(layout, method)
