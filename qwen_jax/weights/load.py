"""A checkpoint to JAX arrays, and JAX arrays back to a checkpoint that can be exported."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.weights._files import progress_bar
from qwen_jax.weights.checkpoint import Checkpoint, Index, blocks
from qwen_jax.weights.names import leaves

if TYPE_CHECKING:
    import jax

    from qwen_jax.leaves import Weight
    from qwen_jax.tokenizer import Tokenizer

Params = dict[str, Any]


def load_params(
    checkpoint: Checkpoint,
    dtype: Any = None,
    shardings: Mapping[str, Any] | None = None,
    *,
    dequantise: bool = True,
    progress: bool = True,
) -> Params:
    """The parameter tree as jax.Arrays, layers stacked.

    `dtype` casts every leaf (default: as stored; bfloat16 for GGUF). `shardings` is a tree of jax.sharding.Sharding
    like the parameters (default: everything on the first device). Leaf by leaf, each process reads only the slices that
    its own devices hold, so the host never holds the whole model beside them. Without `dequantise`, what the checkpoint
    holds quantised stays so, as weights (`qwen_jax.leaves`) that stand for arrays of `dtype`; layers are then apart,
    for each may be quantised in its own way.
    """
    import jax

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    dtypes = {path: np.dtype(dtype) if dtype is not None else stored for path, stored in checkpoint.dtypes.items()}
    total = sum(math.prod(leaf.shape) * dtypes[leaf.path].itemsize for leaf in checkpoint.leaves)
    params: Params = {}
    layers: list[Params] = [{} for _ in range(0 if dequantise else checkpoint.config.num_layers)]
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, progress_bar("loading", total, show=progress) as advance:
        for leaf in checkpoint.leaves:
            sharding = get_leaf(shardings, leaf.path) if shardings is not None else default
            dtype = dtypes[leaf.path]
            section, _, path = leaf.path.partition("/")
            if dequantise or section != "layers":
                weight = None if dequantise else _coded(checkpoint, leaf.path, None, leaf.shape[0], dtype, sharding)
                if weight is None:
                    weight = _dense(checkpoint, leaf.path, leaf.shape, dtype, sharding, pool)
                put_leaf(params, leaf.path, weight)
            else:
                dense = None
                for layer, tree in enumerate(layers):
                    weight = _coded(checkpoint, leaf.path, layer, leaf.shape[1], dtype, sharding)
                    if weight is None:
                        if dense is None:
                            dense = _dense(checkpoint, leaf.path, leaf.shape, dtype, sharding, pool)
                        weight = dense[layer]
                    put_leaf(tree, path, weight)
            advance(math.prod(leaf.shape) * dtype.itemsize)
    if not dequantise:
        from qwen_jax.unstacked import Unstacked

        params["layers"] = Unstacked(layers)
    return params


def load_layer(checkpoint: Checkpoint, layer: int, dtype: Any, shardings: Mapping[str, Any] | None = None) -> Params:
    """Of `load_params` the one layer, dense, and without the axis of layers."""
    return _some(checkpoint, "layers", layer, np.dtype(dtype), shardings)


def load_outside(checkpoint: Checkpoint, shardings: Mapping[str, Any] | None = None) -> Params:
    """Of `load_params` what is in no layer, dense and as stored: embedding, final norm and head."""
    names = dict.fromkeys(leaf.path.partition("/")[0] for leaf in checkpoint.leaves)
    return {name: _some(checkpoint, name, None, None, shardings) for name in names if name != "layers"}


def _some(
    checkpoint: Checkpoint, section: str, layer: int | None, dtype: np.dtype | None, shardings: Mapping[str, Any] | None
) -> Params:
    import jax

    params: Params = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for leaf in checkpoint.leaves:
            name, _, path = leaf.path.partition("/")
            if name == section:
                sharding: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                if shardings is not None:
                    sharding = get_leaf(shardings, leaf.path)
                shape = leaf.shape
                if layer is not None:
                    shape = shape[1:]
                    if shardings is not None:
                        sharding = jax.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
                held = dtype or checkpoint.dtypes[leaf.path]
                weight = _dense(checkpoint, leaf.path, shape, held, sharding, pool, layer)
                put_leaf(params, path, weight)
    return params


def _dense(
    checkpoint: Checkpoint,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Any,
    pool: ThreadPoolExecutor,
    layer: int | None = None,
) -> Any:
    """A leaf of `shape`, or that of one layer."""
    import jax

    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        if layer is None:
            host = _read_shard(checkpoint, path, bounds, dtype, pool)
        else:
            host = _read_shard(checkpoint, path, ((layer, layer + 1), *bounds), dtype, pool)[0]
        shards += [jax.device_put(host, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _coded(
    checkpoint: Checkpoint, path: str, layer: int | None, length: int, dtype: np.dtype, sharding: Any
) -> Weight | None:
    """A leaf, of one layer if it has layers, as its quantised weight, laid out as its dense array would be; or None.

    length: of its first axis.
    """
    import jax

    if not isinstance(sharding, jax.sharding.NamedSharding):
        weight = checkpoint.coded(path, layer, 0, length)
        return None if weight is None else jax.device_put(weight.astype(dtype), sharding)
    first = checkpoint.coded(path, layer, 0, 1)
    if first is None:
        return None
    parts = [*sharding.spec, *[None] * first.ndim][layer is not None :]
    over: dict[str | None, Any] = {None: None} | {str(axis): parts[axis] for axis in range(first.ndim)}
    read: dict[tuple[int, int], Any] = {}

    def placed(number: int, like: np.ndarray, names: Sequence[str | None]) -> jax.Array:
        axes = [over[name] for name in names]
        if names[0] is None:  # the order of inputs, which no row has for itself
            return jax.make_array_from_callback(like.shape, _fitting(sharding, like.shape, axes), like.__getitem__)

        def piece(index: Any) -> np.ndarray:
            bounds = index[0].indices(length)[:2]
            if bounds not in read:
                read[bounds] = jax.tree.leaves(checkpoint.coded(path, layer, *bounds))
            return read[bounds][number][(slice(None), *index[1:])]

        shape = (length, *like.shape[1:])
        return jax.make_array_from_callback(shape, _fitting(sharding, shape, axes), piece)

    arrays, kind = jax.tree.flatten(first.astype(dtype))
    names = first.axes([str(axis) for axis in range(first.ndim)])
    return kind.unflatten([placed(*each) for each in zip(range(len(arrays)), arrays, names, strict=True)])


def _fitting(sharding: Any, shape: Sequence[int], axes: Sequence[Any]) -> Any:
    """Over these mesh axes, as far as they divide the shape: groups are fewer than numbers."""
    import jax

    def fits(size: int, over: Any) -> bool:
        return size % math.prod(sharding.mesh.shape[axis] for axis in jax.tree.leaves(over)) == 0

    kept = [over if fits(size, over) else None for size, over in zip(shape, axes, strict=True)]
    return jax.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*kept))


def _read_shard(
    checkpoint: Checkpoint, path: str, bounds: tuple[tuple[int, int], ...], dtype: np.dtype, pool: ThreadPoolExecutor
) -> np.ndarray:
    host = np.empty([stop - start for start, stop in bounds], dtype)

    def read(block: Index) -> None:
        index = tuple(slice(start + s.start, start + s.stop) for s, (start, _) in zip(block, bounds, strict=True))
        checkpoint.read(path, index, host[block])

    list(pool.map(read, blocks(host.shape, dtype.itemsize)))
    return host


class ParamsCheckpoint(Checkpoint):
    """Parameters in memory as a Checkpoint, for exporting them; `base` gives tokenizer and generation config.

    Leaves are numpy arrays or jax.Arrays of this process, or weights that stand for one (`qwen_jax.leaves`), and layers
    stacked or not, so that what `infer.prepare` made is exported as well. Raises InputError unless the tree is exactly
    `config`'s.
    """

    def __init__(self, params: Mapping[str, Any], config: ModelConfig, base: Checkpoint | None = None) -> None:
        self.config = config
        self.leaves = leaves(config, "hf")
        self.hf_extra = base.hf_extra if base else {}
        self.source = base.source if base else Path("parameters in memory")
        self._base = base
        self._held = _by_path(params)
        self._dense: tuple[Any, Any] = (None, None)  # the weight that was last asked for, and what it stands for
        expected = {leaf.path: leaf.shape for leaf in self.leaves}
        given = {path: _shape(held) for path, held in self._held.items()}
        if wrong := sorted(p for p in expected.keys() | given.keys() if expected.get(p) != given.get(p)):
            path = wrong[0]
            raise InputError(
                f"the parameters do not fit the configuration: {path} should be {expected.get(path, 'absent')}, "
                f"but is {given.get(path, 'absent')}."
            )
        self.dtypes = {path: np.dtype(_first(held).dtype) for path, held in self._held.items()}

    def _read(self, path: str, index: Index, out: np.ndarray) -> None:
        import jax

        from qwen_jax.leaves import Weight

        held = self._held[path]
        if isinstance(held, list) or (isinstance(held, Weight) and path.startswith("layers/")):
            for place, layer in enumerate(range(*index[0].indices(_shape(held)[0]))):
                one = held[layer] if isinstance(held, list) else jax.tree.map(lambda x, i=layer: x[i], held)
                self._copy((path, layer), one, index[1:], out[place])
        else:
            self._copy(path, held, index, out)

    def _copy(self, key: Any, leaf: Any, index: Index, out: np.ndarray) -> None:
        import jax

        from qwen_jax.leaves import Weight

        array = leaf
        if isinstance(leaf, Weight):
            known, array = self._dense
            if known != key:
                array = leaf.dense()
                self._dense = (key, array)
        if not isinstance(array, jax.Array):
            out[...] = array[index]
            return
        for shard in array.addressable_shards:
            held = [s.indices(n) for s, n in zip(shard.index, array.shape, strict=True)]
            common = [(max(s.start, a), min(s.stop, b)) for s, (a, b, _) in zip(index, held, strict=True)]
            if shard.replica_id == 0 and all(a < b for a, b in common):
                # the starts are operands, so that one small program serves every layer
                starts = [a - first for (a, _), (first, _, _) in zip(common, held, strict=True)]
                piece = jax.lax.dynamic_slice(shard.data, starts, [b - a for a, b in common])
                target = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(common, index, strict=True))
                out[target] = np.asarray(piece)

    def tokenizer(self) -> Tokenizer:
        if not self._base:
            raise InputError(
                "parameters in memory have no tokenizer; give ParamsCheckpoint the base that they came from."
            )
        return self._base.tokenizer()

    def generation_config(self) -> dict[str, Any]:
        return self._base.generation_config() if self._base else {}

    def write_assets(self, folder: Path) -> None:
        if self._base:
            self._base.write_assets(folder)


def _by_path(params: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path; a list of them, one for each layer, where layers are apart."""
    from qwen_jax.unstacked import Unstacked

    held: dict[str, Any] = {}
    for name, tree in params.items():
        if isinstance(tree, Unstacked):
            layers = [dict(flatten(layer, f"{name}/")) for layer in tree]
            held |= {path: [layer[path] for layer in layers] for path in layers[0]}
        else:
            held |= dict(flatten({name: tree}))
    return held


def _first(held: Any) -> Any:
    return held[0] if isinstance(held, list) else held


def _shape(held: Any) -> tuple[int, ...]:
    return (len(held), *held[0].shape) if isinstance(held, list) else tuple(held.shape)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(path, leaf) pairs of a nested dict, paths joined by "/"."""
    pairs = []
    for key, value in tree.items():
        pairs += flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [(prefix + key, value)]
    return pairs


def get_leaf(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf of a nested dict at a path such as "layers/mlp/gate/kernel"."""
    node: Any = tree
    for key in path.split("/"):
        node = node[key]
    return node


def put_leaf(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Sets the leaf of a nested dict at a path, making the dicts on the way."""
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf
