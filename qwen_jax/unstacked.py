"""The layers of a model, of its parameters or of its cache: stacked, or each apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax


@jax.tree_util.register_pytree_with_keys_class
class Unstacked(tuple[Any, ...]):
    """One tree per layer, each with buffers of its own, for a loop that is unrolled.

    Whatever is no Unstacked is stacked: its arrays have an axis of layers in front, along which a loop scans.
    """

    def with_layer(self, layer: int, tree: Any) -> Unstacked:
        """This with another tree for one layer."""
        return Unstacked((*self[:layer], tree, *self[layer + 1 :]))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.SequenceKey(i), tree) for i, tree in enumerate(self)], None

    @classmethod
    def tree_unflatten(cls, _: None, layers: Iterable[Any]) -> Unstacked:
        return cls(layers)


def unstack(stacked: Any, *, donate: bool = False) -> Unstacked:
    """Stacked layers, each apart. donate: frees them one array at a time, so that at most one exists twice."""
    if isinstance(stacked, Unstacked):
        return stacked
    arrays, treedef = jax.tree.flatten(stacked)
    split = []
    for array in arrays:
        split.append([array[layer] for layer in range(array.shape[0])])
        if donate:
            array.delete()
    return Unstacked(treedef.unflatten(each) for each in zip(*split, strict=True))


def restacked(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with their layers stacked where all are of one kind and shape, each array freed when it has been."""
    layers = params["layers"]
    if not isinstance(layers, Unstacked):
        return params
    arrays, kinds = zip(*(jax.tree.flatten(layer) for layer in layers), strict=True)
    shapes = [[(array.shape, array.dtype) for array in each] for each in arrays]
    if len(set(kinds)) > 1 or shapes.count(shapes[0]) < len(shapes):
        return params
    stacked = []
    for each in zip(*arrays, strict=True):
        stacked.append(jax.numpy.stack(each))
        for array in each:
            array.delete()
    return params | {"layers": kinds[0].unflatten(stacked)}
