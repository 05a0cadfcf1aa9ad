"""Token embedding, and the same table read the other way as the output head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import DTypeLike

from qwen_jax.layers.linear import project
from qwen_jax.sharding import activation_spec, current_mesh, gathered

AXES = ("vocab", "embed")


class Embedding(nn.Module):
    """A [V, D] table: `__call__` looks rows up, `logits` multiplies by them."""

    vocab_size: int
    features: int
    std: float = 0.02

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), AXES)
        self.embedding: Any = self.param("embedding", init, (self.vocab_size, self.features))

    def __call__(self, tokens: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Rows of the table for int tokens [B, T], as [B, T, D]."""
        mesh = current_mesh()
        rows = _lookup(self.embedding, tokens) if mesh is None else _sharded_lookup(self.embedding, tokens, mesh)
        return rows.astype(dtype or self.embedding.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        return project(gathered(self.embedding, AXES).astype(x.dtype), x)


@jax.custom_vjp
def _lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """table[tokens], zeros where a token is none of the rows. The gradient of a row is summed in float32."""
    return jnp.take(table, tokens, axis=0, mode="fill", fill_value=0)


def _lookup_forward(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
    return _lookup(table, tokens), (tokens, jnp.empty((len(table), 0), table.dtype))


def _lookup_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None]:
    tokens, like_table = residuals
    sums = jnp.zeros((len(like_table), cotangent.shape[-1]), jnp.float32)
    return sums.at[tokens].add(cotangent.astype(jnp.float32), mode="drop").astype(like_table.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _sharded_lookup(table: jax.Array, tokens: jax.Array, mesh: AbstractMesh) -> jax.Array:
    """Each device looks its own tokens up in its own rows; the table's gradient leaves in the parts the table is in."""
    rows, width = activation_spec(mesh, table.shape, *AXES)
    token_spec = activation_spec(mesh, tokens.shape, "batch", "sequence")
    out_spec = activation_spec(mesh, (*tokens.shape, table.shape[1]), "batch", "residual", None)

    def body(table: jax.Array, tokens: jax.Array) -> jax.Array:
        for axis in reversed(jax.tree.leaves(width)):  # one by one: XLA:TPU has no reduce-scatter over all at once
            table = lax.all_gather(table, axis, axis=1, tiled=True)
        if rows is None:
            return _lookup(table, tokens)
        tokens = tokens - lax.axis_index(rows) * len(table)
        tokens = jnp.where(tokens < 0, len(table), tokens)  # negative numbers would count from the end
        found = _lookup(table, tokens)
        if out_spec[1] == token_spec[1]:
            return lax.psum(found, rows)
        return lax.psum_scatter(found, rows, scatter_dimension=1, tiled=True)

    in_specs = (PartitionSpec(rows, width), token_spec)
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False)(table, tokens)
