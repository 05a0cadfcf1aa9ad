"""Parameters as decoding wants them: one pure function of the tree that training, checkpoints and conversion share."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.backend import Backend
from qwen_jax.leaves import Int8, Leaf, Lora, Packed, PackedExperts, Weight, native, pack_mlp
from qwen_jax.model import Params, unstack
from qwen_jax.sharding import current_mesh
from qwen_jax.unstacked import Unstacked


def prepare(params: Params, backend: Backend, *, dtype: DTypeLike | None = None, donate: bool = False) -> Params:
    """The parameters with every layer in buffers of its own and, for a CPU without a mesh, matrices packed.

    dtype: casts what is floating; with native kernels by default to float32, in which they take activations. For
    integer products the layers' dense projections become int8. The input
    stays whole, and what needs no change is shared with it; with `donate` it must not be used afterwards: its layers
    are freed one leaf at a time, so that at most one exists twice. Without `donate`, and without native kernels, it may
    be traced, under `jax.jit` say, to reshard parameters from training to decoding. Prepared parameters may be prepared
    again.
    """

    def cast(leaf: Any) -> Leaf:
        leaf = jax.tree.map(jnp.asarray, leaf)
        return leaf.astype(dtype) if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    params = unstack(params, donate=donate)
    if backend.native:
        params, dtype = _native(params, donate), dtype or jnp.float32
    params = jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    if backend.integer_products:
        params = params | {"layers": _integers(params["layers"], donate)}
    return _packed(params) if backend.kernels == "cpu" and current_mesh() is None else params


def _native(params: Params, donate: bool) -> Params:
    """Projections, embedding and head as the C kernels take them, several at a time: packing holds no lock."""

    def packed(entry: tuple[tuple[Any, ...], Leaf]) -> Leaf:
        path, leaf = entry
        if path[-1].key not in ("kernel", "embedding"):
            return leaf
        made = native.pack(leaf, num_in=2 if path[-2].key == "o" else 1)
        if donate:
            kept = set(map(id, jax.tree.leaves(made)))
            for array in jax.tree.leaves(leaf):
                if id(array) not in kept and isinstance(array, jax.Array):
                    array.delete()
        return made

    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return treedef.unflatten(pool.map(packed, leaves))


def _integers(layers: Unstacked, donate: bool) -> Unstacked:
    """Dense projections as int8 with a scale for each output channel."""

    def quantised(leaf: Leaf, num_in: int) -> Leaf:
        if isinstance(leaf, Lora):
            return leaf.replace(base=quantised(leaf.base, num_in))
        if not isinstance(leaf, jax.Array):
            return leaf
        made = Int8.quantise(leaf, num_in)
        if donate:
            leaf.delete()
        return made

    def of_layers(path: tuple[Any, ...], leaf: Leaf) -> Leaf:
        module, name = path[-2].key, path[-1].key
        is_projection = name == "kernel" and module in ("q", "k", "v", "o", "gate", "up", "down")
        return quantised(leaf, num_in=2 if module == "o" else 1) if is_projection else leaf

    return jax.tree_util.tree_map_with_path(of_layers, layers, is_leaf=lambda leaf: isinstance(leaf, Weight))


def _packed(tree: Any) -> Any:
    if isinstance(tree, Unstacked):
        return Unstacked(map(_packed, tree))
    if not isinstance(tree, dict):
        return tree
    names = ("gate", "up", "down")
    if all(_is_bfloat16(tree.get(name)) for name in names):
        packed = pack_mlp(*(tree[name]["kernel"] for name in names))
        return {name: {"kernel": weight} for name, weight in zip(names, packed, strict=True)}
    return {
        name: _packed_leaf(name, leaf) if isinstance(leaf, jax.Array | Lora) else _packed(leaf)
        for name, leaf in tree.items()
    }


def _packed_leaf(name: str, leaf: Any) -> Leaf:
    if isinstance(leaf, Lora):
        return leaf.replace(base=_packed_leaf(name, leaf.base))
    if not isinstance(leaf, jax.Array):
        return leaf
    if name in ("gate", "up", "down"):  # of experts
        return PackedExperts.pack(leaf) if leaf.dtype.itemsize == 2 else leaf
    return Packed((leaf,)) if name in ("kernel", "embedding") else leaf


def _is_bfloat16(linear: Any) -> bool:
    """Whether this is a dense kernel in bfloat16: in float32, an MLP gains nothing by parts (docs/performance.md)."""
    kernel = linear["kernel"] if isinstance(linear, dict) else None
    return isinstance(kernel, jax.Array) and kernel.dtype == jnp.bfloat16
