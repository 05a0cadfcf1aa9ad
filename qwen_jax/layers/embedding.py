"""Token embedding, and the same table read the other way as the output head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.layers.linear import project
from qwen_jax.layers.param import declare
from qwen_jax.sharding import constrain


class Embedding(nn.Module):
    """A [V, D] table: `__call__` looks rows up, `logits` multiplies by them."""

    vocab_size: int
    features: int
    std: float = 0.02

    def setup(self) -> None:
        init, shape = nn.initializers.normal(self.std), (self.vocab_size, self.features)
        self.embedding = declare(self, "embedding", init, shape, ("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Rows of the table for int tokens [B, T], as [B, T, D]."""
        rows = jnp.take(self.embedding, tokens, axis=0).astype(dtype or self.embedding.dtype)
        return constrain(rows, "batch", "residual", None)

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        return project(self.embedding.astype(x.dtype), x)
