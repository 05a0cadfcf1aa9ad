"""Token embedding, and the same table read the other way as the output head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from qwen_jax.layers.param import declare
from qwen_jax.leaves import Leaf, gathered, gathered_in_shards, lookup, matmul, specs
from qwen_jax.sharding import activation_spec, current_mesh

AXES = ("vocab", "embed")


class Embedding(nn.Module):
    """A [V, D] table: `__call__` looks rows up, `logits` multiplies by them."""

    vocab_size: int
    features: int
    std: float = 0.02

    def setup(self) -> None:
        shape = (self.vocab_size, self.features)
        self.embedding: Any = declare(self, "embedding", nn.initializers.normal(self.std), shape, AXES)

    def __call__(self, tokens: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Rows of the table for int tokens [B, T], as [B, T, D]."""
        mesh = current_mesh()
        rows = lookup(self.embedding, tokens) if mesh is None else _sharded_lookup(self.embedding, tokens, mesh)
        return rows.astype(dtype or self.embedding.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        return matmul(gathered(self.embedding, AXES), x)


def _sharded_lookup(table: Leaf, tokens: jax.Array, mesh: AbstractMesh) -> jax.Array:
    """Each device looks its own tokens up in its own rows; the table's gradient leaves in the parts the table is in."""
    rows = activation_spec(mesh, table.shape, *AXES)[0]
    token_spec = activation_spec(mesh, tokens.shape, "batch", "sequence")
    out_spec = activation_spec(mesh, (*tokens.shape, table.shape[1]), "batch", "residual", None)
    table_specs = specs(table, AXES, mesh)

    def body(table: Leaf, tokens: jax.Array) -> jax.Array:
        table = gathered_in_shards(table, AXES, table_specs)
        if rows is None:
            return lookup(table, tokens)
        tokens = tokens - lax.axis_index(rows) * table.shape[0]
        tokens = jnp.where(tokens < 0, table.shape[0], tokens)  # negative numbers would count from the end
        found = lookup(table, tokens)
        if out_spec[1] == token_spec[1]:
            return lax.psum(found, rows)
        return lax.psum_scatter(found, rows, scatter_dimension=1, tiled=True)

    in_specs = (table_specs, token_spec)
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False)(table, tokens)
