"""Training by adapter: LoRA and DoRA over frozen weights of any kind, as PEFT has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.leaves import Lora, Weight
from qwen_jax.local_path import LocalPath
from qwen_jax.model import Params
from qwen_jax.unstacked import Unstacked
from qwen_jax.weights.load import get_leaf
from qwen_jax.weights.names import Leaf, leaves
from qwen_jax.weights.peft import Adapter, LowRank, apply_adapter, read_adapter


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Which matrices get an adapter, and of which size; with one, nothing else is trained."""

    rank: int = 0
    """Of the two factors; 0 trains the weights themselves."""
    alpha: float = 16.0
    """The factors' product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Modules that are adapted, by Hugging Face's names; `embed_tokens` and `lm_head` where they are two tables."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Train the lengths of rows as well (arXiv 2402.09353)."""
    start: LocalPath | None = None
    """PEFT folder to start from, instead of an adapter that changes nothing; its rank and targets count."""
    dequantise: bool = False
    """Widen a quantised base, which is faster and takes more memory."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or (self.rank and not self.targets):
            raise InputError("an adapter needs a rank of at least 0, an alpha above 0 and at least one target.")

    @property
    def is_used(self) -> bool:
        return self.rank > 0 or self.start is not None

    @property
    def scaling(self) -> float:
        """What the factors' product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapted(config: AdapterConfig, model: ModelConfig, params: Params, seed: int) -> Params:
    """The parameters with an adapter over each target. Raises InputError for targets that this model does not have."""
    if config.start is not None:
        return apply_adapter(params, read_adapter(config.start, model))
    by_target = {
        target: [leaf for leaf in leaves(model, "hf") if target_of(leaf) == target] for target in config.targets
    }
    known = sorted({target_of(leaf) for leaf in leaves(model, "hf") if len(leaf.unit) > leaf.row_axes})
    for target, found in by_target.items():
        if target in ("embed_tokens", "lm_head") and model.tie_word_embeddings:
            raise InputError(
                f"adapter.targets has {target!r}, but this model's embedding and head are one table, so that one "
                "over either would change both; leave it out, or start from a model whose tables are two."
            )
        if not found or len(found[0].unit) == found[0].row_axes:
            raise InputError(f"adapter.targets has {target!r}, which this model lacks; known: {', '.join(known)}.")
        if any(leaf.file_shape[0] != leaf.rows for leaf in found):
            raise InputError(f"adapter.targets has {target!r}, which joins queries, keys and values; choose others.")
    key = jax.random.key(seed)
    created = {}
    for number, leaf in enumerate(leaf for found in by_target.values() for leaf in found):
        created[leaf.path] = _create(config, leaf, params, jax.random.fold_in(key, number))
    return apply_adapter(params, created)


def target_of(leaf: Leaf) -> str:
    """The last part of the name of the module that holds a leaf."""
    return leaf.tensor.removesuffix(".weight").rpartition(".")[2]


def _create(config: AdapterConfig, leaf: Leaf, params: Params, key: jax.Array) -> LowRank:
    """An adapter over a leaf that changes nothing yet."""
    front, num_in = len(leaf.shape) - len(leaf.unit), leaf.num_in
    shape = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    new = Lora.create(shape, config.rank, config.scaling * config.rank, key, num_in=num_in, num_front=front)
    magnitude = None
    if config.dora:
        section, _, rest = leaf.path.partition("/")
        trees = params["layers"] if isinstance(params["layers"], Unstacked) and section == "layers" else [params]
        each = [_row_lengths(get_leaf(tree, rest if len(trees) > 1 else leaf.path), num_in) for tree in trees]
        magnitude = np.stack(each) if len(each) > 1 else each[0]
    return LowRank(np.asarray(new.a), np.asarray(new.b), magnitude, config.scaling)


def _row_lengths(weight: Any, num_in: int) -> np.ndarray:
    dense = weight.dense() if isinstance(weight, Weight) else weight
    summed = tuple(range(dense.ndim - num_in, dense.ndim))
    return np.asarray(jnp.sqrt(jnp.sum(jnp.square(dense.astype(jnp.float32)), summed)))


def is_of_adapter(path: Any) -> bool:
    """Whether a path of the parameter tree leads to an array of an adapter."""
    return isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("a", "b", "magnitude")


def adapter_of(model: ModelConfig, params: Mapping[str, Any]) -> Adapter:
    """The adapter in a tree whose arrays this process holds; the base need not be there."""
    found: dict[str, LowRank] = {}
    layers = params["layers"]
    for leaf in leaves(model, "hf"):
        section, _, rest = leaf.path.partition("/")
        apart = isinstance(layers, Unstacked) and section == "layers"
        each = [get_leaf(tree, rest) for tree in layers] if apart else [get_leaf(params, leaf.path)]
        if isinstance(each[0], Lora):
            a, b, magnitude = (_together(each, name, apart) for name in ("a", "b", "magnitude"))
            found[leaf.path] = LowRank(a, b, magnitude, each[0].scaling)
    return found


def _together(adapters: list[Lora], name: str, apart: bool) -> Any:
    """An array of an adapter, stacked where layers are apart; None where there is none."""
    arrays = [getattr(adapter, name) for adapter in adapters]
    return None if arrays[0] is None else np.stack(arrays) if apart else np.asarray(arrays[0])
