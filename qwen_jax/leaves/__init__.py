"""What may stand for a weight in the parameter tree, and the products that the model makes with one."""

from qwen_jax.leaves.blocks import Blocks
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.groupwise import Groupwise
from qwen_jax.leaves.int8 import Int8
from qwen_jax.leaves.lora import Lora
from qwen_jax.leaves.observed import Observed
from qwen_jax.leaves.packed import Packed, PackedExperts, pack_mlp
from qwen_jax.leaves.project import project, swiglu, swiglu_mlp
from qwen_jax.leaves.rounded import Rounded, rounded
from qwen_jax.leaves.weight import (
    Leaf,
    Weight,
    gathered,
    gathered_in_shards,
    grouped_matmul,
    lookup,
    map_arrays,
    matmul,
    specs,
)

__all__ = [
    "Blocks",
    "Grouped",
    "Groupwise",
    "Int8",
    "Leaf",
    "Lora",
    "Observed",
    "Packed",
    "PackedExperts",
    "Rounded",
    "Weight",
    "gathered",
    "gathered_in_shards",
    "grouped_matmul",
    "lookup",
    "map_arrays",
    "matmul",
    "pack_mlp",
    "project",
    "rounded",
    "specs",
    "swiglu",
    "swiglu_mlp",
]
