"""The matrices of a layer in the order in which a pass meets them, each group of those that share an input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.leaves import Observed
from qwen_jax.weights.load import get_leaf, put_leaf
from qwen_jax.weights.names import Leaf, leaves

Layer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Matrices with one input, by their paths in a layer. The first of each of `groups` is the one observed."""

    groups: tuple[tuple[str, ...], ...]
    """those that see the same rows; two groups where experts see some rows each, and the shared expert all"""
    norm: str | None = None
    """whose output the input is"""
    kept: tuple[str, ...] = ()
    """what else has this input, and is not quantised"""
    producer: str | None = None
    """of whose outputs the input is a product with something else, or an average"""


def stages(config: ModelConfig) -> list[Stage]:
    """All quantised matrices of a layer."""
    q, k, v, o = (f"attention/{name}/kernel" for name in "qkvo")
    found = [Stage(((q, k, v),), "attention_norm/scale"), Stage(((o,),), producer=v)]
    if not config.moe:
        gate, up, down = (f"mlp/{name}/kernel" for name in ("gate", "up", "down"))
        return [*found, Stage(((gate, up),), "mlp_norm/scale"), Stage(((down,),), producer=up)]
    gate, up, down = (f"moe/experts/{name}" for name in ("gate", "up", "down"))
    groups, kept = [(gate, up)], ["moe/router/kernel"]
    last = [Stage(((down,),), producer=up)]
    if config.moe.shared_intermediate_size:
        gate, up, down = (f"moe/shared/{name}/kernel" for name in ("gate", "up", "down"))
        groups, kept = [*groups, (gate, up)], [*kept, "moe/shared_gate/kernel"]
        last.append(Stage(((down,),), producer=up))
    return [*found, Stage(tuple(groups), "mlp_norm/scale", tuple(kept)), *last]


class Matrices:
    """The leaves of a layer as matrices [*experts, out, in], and back."""

    def __init__(self, config: ModelConfig) -> None:
        self._leaves = {leaf.path.removeprefix("layers/"): leaf for leaf in leaves(config, "hf")}

    def leaf(self, path: str) -> Leaf:
        return self._leaves[path]

    def num_experts(self, path: str) -> int:
        """0 for a matrix of which there is one."""
        leaf = self._leaves[path]
        return leaf.shape[1] if len(leaf.shape) - len(leaf.unit) == 2 else 0

    def get(self, layer: Layer, path: str) -> jax.Array:
        leaf, array = self._leaves[path], get_leaf(layer, path)
        front = array.shape[: array.ndim - len(leaf.unit)]
        return array.reshape(*front, leaf.rows, -1)

    def with_matrix(self, layer: Layer, path: str, matrix: jax.Array) -> Layer:
        """The layer with another matrix, or vector, at a path."""
        return replaced(layer, path, jnp.reshape(matrix, get_leaf(layer, path).shape))

    def observed(self, layer: Layer, path: str) -> Layer:
        """The layer with a leaf that sees its inputs."""
        leaf, array = self._leaves[path], get_leaf(layer, path)
        num_in = len(leaf.unit) - leaf.row_axes
        return replaced(layer, path, Observed.of(array, array.ndim - len(leaf.unit), num_in))


def replaced(layer: Layer, path: str, leaf: Any) -> Layer:
    """A layer with another leaf at a path; the rest is shared."""
    copy = jax.tree.map(lambda x: x, layer, is_leaf=lambda x: not isinstance(x, dict))
    put_leaf(copy, path, leaf)
    return copy
