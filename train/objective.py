"""The seam between the loop and what is minimised: an objective sees models and a batch, and gives a loss and terms.

Meshes, micro-batches, accumulation, the optimiser, checkpoints and exact resume know nothing of objectives.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.layers.moe import RouterStats
from qwen_jax.leaves import Leaf, Weight, rounded
from qwen_jax.model import Inputs, Params, forward
from train.batch import TokenBatch
from train.loss import LossSums, cross_entropy, logprobs


class Term(flax.struct.PyTreeNode):
    """A mean in the making: float32 sums over tokens, pairs or what an objective counts. Terms of parts add up."""

    total: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        return self.total / jnp.maximum(self.weight, 1)


@dataclasses.dataclass(frozen=True)
class Role:
    """A model that an objective needs."""

    trainable: bool = True
    """Else its weights are an argument of the step, in the dtype they have, without gradient or moments."""


class Models:
    """The models of one micro-batch, by role; every one has the run's architecture."""

    def __init__(
        self,
        config: ModelConfig,
        roles: Mapping[str, Role],
        params: Mapping[str, Params],
        dtype: str,
        gradient_dtype: str,
        remat: str,
    ) -> None:
        self._config, self._roles, self._params = config, roles, params
        self._dtype, self._gradient_dtype = dtype, gradient_dtype
        self._remat = remat
        self.routers: list[RouterStats] = []
        """Of each pass of a mixture of experts that is trained, for the load-balancing loss that the step adds."""

    def hidden(self, role: str, batch: TokenBatch) -> jax.Array:
        """Final hidden states [B, T, D] in the compute dtype."""
        out = forward(
            self._config,
            cast_layers(self._params[role], self._dtype, self._gradient_dtype),
            Inputs.training(batch.tokens, segment_ids=batch.segment_ids, rotary_positions=batch.positions),
            dtype=self._dtype,
            remat=self._remat,
        )
        if out.router is not None and self._roles[role].trainable:
            self.routers.append(out.router)
        return out.hidden

    def head(self, role: str) -> Leaf:
        """The output embedding [V, D], of whatever kind."""
        return self._params[role]["embed" if self._config.tie_word_embeddings else "lm_head"]["embedding"]

    def cross_entropy(self, role: str, batch: TokenBatch, z_loss: float = 0.0) -> LossSums:
        """Sums over the batch's targets, each weighted by `loss_mask`: the cheapest loss there is."""
        return cross_entropy(self.hidden(role, batch), self.head(role), batch.targets, batch.loss_mask, z_loss=z_loss)

    def logprobs(self, role: str, batch: TokenBatch, temperature: float = 1.0) -> jax.Array:
        """float32 [B, T]: of each target, whatever `loss_mask` says; differentiable."""
        return logprobs(self.hidden(role, batch), self.head(role), batch.targets, temperature=temperature)


class Objective(abc.ABC):
    """What is minimised; a frozen dataclass of its settings."""

    batch: ClassVar[type[TokenBatch]]
    roles: ClassVar[Mapping[str, Role]]

    @abc.abstractmethod
    def weights(self, batch: Any) -> dict[str, jax.Array]:
        """The denominators, of a whole batch, before it is cut into micro-batches; reported among the metrics."""

    @abc.abstractmethod
    def __call__(self, models: Models, batch: Any, weights: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Term]]:
        """Of a micro-batch: its share of the loss of the whole batch, so that those of all micro-batches add up to it,
        and what is reported, of which one is "loss"."""


def cast_layers(params: Params, dtype: str, gradient_dtype: str) -> Params:
    """Matrices of the layers in the compute dtype, so that FSDP gathers those bytes only.

    Norms and biases are cast where they are used, if at all, and so are the embedding and the head, whose gradients are
    thereby summed in float32. Those of what is cast here are of `dtype`, unless `gradient_dtype` is float32.
    """

    def cast(path: Any, leaf: Leaf) -> Leaf:
        if path[-1].key in ("scale", "bias"):
            return leaf
        return rounded(leaf, dtype) if gradient_dtype != dtype == "bfloat16" else leaf.astype(dtype)

    layers = jax.tree_util.tree_map_with_path(cast, params["layers"], is_leaf=lambda leaf: isinstance(leaf, Weight))
    return params | {"layers": layers}
