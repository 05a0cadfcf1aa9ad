"""A weight is a value: a dense array, or a small pytree that stands for one at the same path of the parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import DTypeLike

from qwen_jax import sharding
from qwen_jax.kernels.grouped import grouped_matmul as dense_grouped_matmul
from qwen_jax.leaves import dense

# An array of a weight; in a tree of shapes, shardings or gradients, what stands there for it.
Component = Any


class Weight(flax.struct.PyTreeNode):
    """Stands for a dense array [*out, *in], or for one per expert or layer, with these axes in front.

    A kind gives `shape`, `dtype`, `dense` and `axes`, and overrides the products that it has a better way to make. What
    axes are in front is in front of each of its arrays, so that a scan over layers cuts it as it cuts an array.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that this stands for."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """Of the array that this stands for; what embeds in it gives a model's activations their type."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def astype(self, dtype: DTypeLike) -> Any:
        """The same, standing for an array of another float type."""
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, self)

    def dense(self) -> jax.Array:
        """The array that this stands for."""
        raise NotImplementedError

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        """Logical names of the axes of each of its arrays, in the order of its fields, given those of `shape`'s."""
        raise NotImplementedError

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        """See `matmul`."""
        return matmul(self.dense(), x, num_in, dtype)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """See `lookup`."""
        return lookup(self.dense(), ids)

    def grouped_matmul(self, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
        """See `grouped_matmul`."""
        return grouped_matmul(self.dense(), rows, group_sizes, dtype)


Leaf = jax.Array | Weight


def matmul(weight: Leaf, x: jax.Array, num_in: int = 1, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Sums `weight[*out, *in] * x[*batch, *in]` over the last `num_in` axes in float32; [*batch, *out] in `dtype`.

    Multiplied in x's dtype, gradients as well.
    """
    if isinstance(weight, Weight):
        return weight.matmul(x, num_in, dtype)
    return dense.matmul(weight.astype(x.dtype), x, num_in, dtype)


def lookup(weight: Leaf, ids: jax.Array) -> jax.Array:
    """Rows `weight[ids]` of a table [V, D], zeros where an id is none of the rows; ids int [*batch], [*batch, D]."""
    return weight.lookup(ids) if isinstance(weight, Weight) else dense.lookup(weight, ids)


def grouped_matmul(weight: Leaf, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Each expert's product with its own rows: weight [E, out, in], rows [N, in] -> [N, out] in `dtype`.

    The first group_sizes[0] rows are expert 0's, and so on; rows beyond the groups come out undefined.
    """
    if isinstance(weight, Weight):
        return weight.grouped_matmul(rows, group_sizes, dtype)
    return dense_grouped_matmul(weight.astype(rows.dtype), rows, group_sizes, dtype)


def map_arrays(
    function: Callable[..., Any], weight: Leaf | jax.ShapeDtypeStruct, axes: Sequence[str | None], *rest: Any
) -> Any:
    """A leaf with function(array, logical names of its axes, ...) in place of each of its arrays.

    `axes` name those of the leaf's shape; `rest` are further trees like the leaf.
    """
    arrays, treedef = jax.tree.flatten(weight)
    names = weight.axes(axes) if isinstance(weight, Weight) else [axes]
    columns = (arrays, names, *(treedef.flatten_up_to(tree) for tree in rest))
    return treedef.unflatten([function(*row) for row in zip(*columns, strict=True)])


def gathered(weight: Leaf, axes: Sequence[str | None]) -> Any:
    """A leaf as a layer computes with it, each array whole along what FSDP splits (`sharding.gathered`)."""
    return map_arrays(sharding.gathered, weight, axes)


def specs(weight: Leaf, axes: Sequence[str | None], mesh: AbstractMesh) -> Any:
    """How each array of a leaf lies on the mesh."""
    return map_arrays(lambda array, names: sharding.activation_spec(mesh, array.shape, *names), weight, axes)


def gathered_in_shards(weight: Leaf, axes: Sequence[str | None], specs: Any) -> Any:
    """As `gathered`, from a device's own shards within a shard_map over `specs`; the gradient is scattered."""

    def gather(array: jax.Array, names: Sequence[str | None], spec: PartitionSpec) -> jax.Array:
        for dimension, (name, over) in enumerate(zip(names, spec, strict=True)):
            if name in sharding.GATHERED:
                for axis in reversed(jax.tree.leaves(over)):  # one by one: XLA:TPU reduce-scatters over one at a time
                    array = sharding.gather_parts(array, axis, dimension)
        return array

    return map_arrays(gather, weight, axes, specs)
