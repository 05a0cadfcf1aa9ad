"""The attention layer: projections, rotation, attention over the new keys or over the cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.cache import Cache
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.layers.linear import Linear, residual_std
from qwen_jax.layers.norm import RMSNorm
from qwen_jax.layers.rope import Rotary, Tables, rotate
from qwen_jax.layers.sharded_attention import attention, repeat_heads
from qwen_jax.layers.sparse import SparseBudget
from qwen_jax.sharding import constrain


class Context(flax.struct.PyTreeNode):
    """What every layer of a pass is told of the tokens: how they are turned, what they see and how much of it."""

    rotary: Rotary
    spec: AttentionSpec
    is_token: jax.Array | None = None  # [B, T] bool, False at padding
    budget: SparseBudget | None = None  # over a cache read no more than this, see `sparse_attention`

    def of_layer(self, layer: jax.Array | int, window: jax.Array | int | None) -> Context:
        sparse = self.budget is not None and window is None
        return self.replace(
            spec=self.spec.replace(window=window),
            budget=self.budget.of_layer(layer) if self.budget and sparse else None,
        )


def take_token(tree: Any, index: jax.Array | None) -> Any:
    """Token `index` [B] of every array [B, T, ...] in `tree`, as [B, 1, ...]; without an index, the tree."""
    if index is None:
        return tree
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1), tree)


class Attention(nn.Module):
    """Grouped-query attention with the biases and norms that `config` has."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config

        def heads(num: int, axis: str) -> Linear:
            axes = (axis, "head_dim")
            return Linear((num, c.head_dim), (c.hidden_size,), axes, ("embed",), c.qkv_bias, c.initializer_range)

        self.q, self.k, self.v = heads(c.num_heads, "heads"), *(heads(c.num_kv_heads, "kv_heads") for _ in "kv")
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.rms_norm_eps, "head_dim") for _ in "qk")
        std = residual_std(c.initializer_range, c.num_layers) if c.model_type == "qwen" else c.initializer_range
        self.o = Linear((c.hidden_size,), (c.num_heads, c.head_dim), ("embed",), ("heads", "head_dim"), std=std)

    def queries(self, x: jax.Array, turns: tuple[Tables, ...]) -> jax.Array:
        """x [B, T, D] projected and turned in each way: [n, B, T, H, h], or for a single way [B, T, H, h]."""
        q = constrain(self.q(x), "batch", "sequence", "heads", None)
        q = self.q_norm(q) if self.config.qk_norm else q
        turned = [rotate(q, tables) for tables in turns]
        return jnp.stack(turned) if len(turned) > 1 else turned[0]

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array | int, only: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """x [B, T, D] -> (y [B, T, D], the cache with the new keys and values).

        With `only` [B], the one query of each row that is wanted, y is [B, 1, D].
        """
        rotary, spec, budget = context.rotary, context.spec, context.budget
        k, v = (constrain(project(x), "batch", "sequence", "kv_heads", None) for project in (self.k, self.v))
        k = rotate(self.k_norm(k) if self.config.qk_norm else k, rotary.key)
        k, v = (jnp.swapaxes(repeat_heads(new), 1, 2) for new in (k, v))  # [B, K, T, h]
        cache = cache.write(layer, k, v, spec.start) if cache is not None else None

        holds_more = cache is not None and not spec.from_beginning
        turns = rotary.query
        if only is not None:
            x, turns = take_token((x, rotary.attending), only)
            spec, budget = spec.of_query(only), None
        elif budget is None or not holds_more:
            turns, budget = rotary.attending, None
        q = self.queries(x, turns)
        if cache is not None and holds_more:
            out = cache.attend(layer, q, spec, budget)
        else:
            out = attention(q, k, v, spec)
        return self.o(constrain(out, "batch", "sequence", "heads", None)), cache
