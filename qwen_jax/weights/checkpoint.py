"""Every source of weights behind one interface: the leaves of our parameter tree, read slice by slice."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.checked import printable, read_json, read_mapping
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.weights._files import reading
from qwen_jax.weights.names import Leaf, Style, leaves
from qwen_jax.weights.stored import CODE_DTYPES, PLAIN_DTYPES, StoredTensor

if TYPE_CHECKING:
    from qwen_jax.leaves import Weight
    from qwen_jax.tokenizer import Tokenizer

Index = tuple[slice, ...]

BLOCK_BYTES = 32 << 20  # how much is read, decoded or written at a time

# what besides weights makes a model folder usable; code files only matter to Qwen1's remote code
_ASSETS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "qwen.tiktoken", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "*.py",
)  # fmt: skip
# keys of config.json that ModelConfig does not hold, because they do not change the network
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "auto_map", "tokenizer_class")


class Checkpoint(abc.ABC):
    """A model's weights as leaves of our parameter tree, wherever they lie.

    `leaves` gives path and stacked shape of each leaf, `dtypes` the dtype that a conversion keeps by default,
    `hf_extra` the keys of config.json that ModelConfig does not hold (token ids).
    """

    source: Path
    config: ModelConfig
    leaves: list[Leaf]
    dtypes: dict[str, np.dtype]
    hf_extra: dict[str, Any]

    def read(self, path: str, index: Index, out: np.ndarray) -> None:
        """Fills `out`, of any float dtype, with leaf `path` at `index`: one slice of step 1 for each axis.

        Raises InputError when a weight is too large for float16.
        """
        with np.errstate(over="ignore"):
            self._read(path, index, out)
        if out.dtype == np.float16 != self.dtypes[path] and np.isinf(out).any():
            raise InputError(f"{path} has weights beyond float16's range of 65504; use bfloat16 or float32.")

    @property
    def is_quantised(self) -> bool:
        """Whether `coded` has a weight for any leaf."""
        return False

    def coded(self, path: str, layer: int | None, start: int, stop: int) -> Weight | None:
        """What of leaf `path` lies from start to stop along its first axis, as the quantised weight that is stored.

        Its arrays are numpy's. Of a leaf with layers, that of one `layer`. None where the leaf is stored dense.
        """
        return None

    @abc.abstractmethod
    def _read(self, path: str, index: Index, out: np.ndarray) -> None: ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights. Raises InputError when there is none."""
        from qwen_jax.tokenizer import load_tokenizer

        return load_tokenizer(self.source)

    def generation_config(self) -> dict[str, Any]:
        """The mapping of generation_config.json (token ids, sampling defaults); empty when there is none."""
        return read_mapping(self.source / "generation_config.json")

    @abc.abstractmethod
    def write_assets(self, folder: Path) -> None:
        """Puts the tokenizer's files and generation_config.json into `folder`, as far as there are any."""


class TensorCheckpoint(Checkpoint):
    """Tensors in files under Hugging Face, Qwen1 or GGUF names. Raises InputError unless they are just the model's."""

    def __init__(
        self,
        source: Path,
        config: ModelConfig,
        tensors: Mapping[str, StoredTensor],
        style: Style,
        *,
        hf_extra: Mapping[str, Any],
        dtype: np.dtype | None = None,
    ) -> None:
        self.config = config
        self.hf_extra = dict(hf_extra)
        self.source = source
        self.leaves = leaves(config, style)
        self._by_path = {leaf.path: leaf for leaf in self.leaves}
        named = ((leaf.path, leaf.tensor.format(*index)) for leaf in self.leaves for index in leaf.indices())
        names: dict[str, list[str]] = {leaf.path: [] for leaf in self.leaves}
        used = set()
        for path, name in named:  # up to the first that lacks, for a configuration may claim any number of layers
            if name not in tensors:
                raise InputError(f"{source} lacks the tensor {name}; it is incomplete, download it again.")
            names[path].append(name)
            used.add(name)
        if extra := [printable(name) for name in tensors if name not in used]:
            raise InputError(
                f"{source} holds the tensor {first_of(extra)}, which is not part of a {config.model_type}."
            )
        self._tensors: dict[str, StoredTensor] = {}
        self.dtypes = {}
        for leaf in self.leaves:
            stored = [tensors[name] for name in names[leaf.path]]
            for name, tensor in zip(names[leaf.path], stored, strict=True):
                if tensor.shape != leaf.file_shape:
                    raise InputError(
                        f"{source}: tensor {name} has shape {tensor.shape}, but the configuration says "
                        f"{leaf.file_shape}; weights and configuration do not belong together."
                    )
                if tensor.encoding in CODE_DTYPES:
                    raise tensor.unread()
                if tensor.strides is None and tensor.shape != leaf.matrix_shape:
                    tensor = dataclasses.replace(tensor, shape=leaf.matrix_shape)
                self._tensors[name] = tensor
            encodings = {PLAIN_DTYPES.get(tensor.encoding, np.dtype(np.float32)) for tensor in stored}
            self.dtypes[leaf.path] = dtype or functools.reduce(np.promote_types, encodings)

    def _read(self, path: str, index: Index, out: np.ndarray) -> None:
        leaf = self._by_path[path]
        stacked = len(leaf.shape) - len(leaf.unit)
        ranges = [range(*s.indices(n)) for s, n in zip(index[:stacked], leaf.shape, strict=False)]
        for unit in itertools.product(*ranges):
            place = tuple(i - r.start for i, r in zip(unit, ranges, strict=True))
            self._read_unit(leaf, unit, index[stacked:], out[(*place, ...)])

    def _read_unit(self, leaf: Leaf, unit: tuple[int, ...], index: Index, out: np.ndarray) -> None:
        tensor = self._tensors[leaf.tensor.format(*unit)]
        per_item = math.prod(leaf.unit[1 : leaf.row_axes])  # rows of the file in one step of the unit's first axis
        first, last, _ = index[0].indices(leaf.unit[0])
        begin = leaf.first_row + first * per_item
        for a, b, rows in tensor.rows(begin, leaf.first_row + last * per_item, multiple_of=per_item):
            values = rows.reshape(-1, *leaf.unit[1:])[(slice(None), *index[1:])]
            out[(a - begin) // per_item : (b - begin) // per_item] = values

    @property
    def is_quantised(self) -> bool:
        tensors = self._tensors.values()
        return any(not isinstance(tensor, StoredTensor) or tensor.encoding not in PLAIN_DTYPES for tensor in tensors)

    def coded(self, path: str, layer: int | None, start: int, stop: int) -> Weight | None:
        leaf, front = self._by_path[path], () if layer is None else (layer,)
        if len(leaf.shape) - len(leaf.unit) > len(front):  # a tensor for each expert
            each = [self._coded(leaf, (*front, expert), 0, leaf.unit[0]) for expert in range(start, stop)]
            if None in each:
                return None
            return stacked(each, f"{self.source}: experts of layer {layer}")
        return self._coded(leaf, front, start, stop)

    def _coded(self, leaf: Leaf, unit: tuple[int, ...], start: int, stop: int) -> Weight | None:
        per_item = math.prod(leaf.unit[1 : leaf.row_axes])
        tensor = self._tensors[leaf.tensor.format(*unit)]
        weight = tensor.coded(leaf.first_row + start * per_item, leaf.first_row + stop * per_item)
        if weight is None:
            return None
        outer, inner = (stop - start, *leaf.unit[1 : leaf.row_axes]), leaf.unit[leaf.row_axes :]
        return weight.of_matrix(outer, inner)

    def write_assets(self, folder: Path) -> None:
        copy_assets(self.source, folder)


def stacked(weights: Sequence[Any], what: str) -> Any:
    """Weights, or arrays, as one with an axis of them in front. Raises InputError unless they are all coded alike."""
    import jax

    arrays, kinds = zip(*(jax.tree.flatten(weight) for weight in weights), strict=True)
    if len(set(kinds)) > 1:
        raise InputError(f"{what} are not all quantised alike, which is not supported; use a file where they are.")
    return kinds[0].unflatten([np.stack(each) for each in zip(*arrays, strict=True)])


def first_of(names: Sequence[str]) -> str:
    """The first of some names and how many more there are, for a sentence."""
    return min(names) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def copy_assets(source: Path, folder: Path) -> None:
    """Copies tokenizer files, generation_config.json and Qwen1's code files from one model folder to another."""
    for pattern in _ASSETS:
        for file in source.glob(pattern):
            with reading(file):
                content = file.read_bytes()
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(content)


def read_hf_extra(folder: Path) -> dict[str, Any]:
    """The keys of a folder's config.json that ModelConfig does not hold but an export should keep."""
    raw = read_json(folder / "config.json")
    return {key: raw[key] for key in _TOKEN_KEYS if raw.get(key) is not None}


def block_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The shape of blocks of about BLOCK_BYTES that split the first axis, then the second."""
    block = list(shape)
    for axis in range(min(2, len(shape))):
        per_item = itemsize * math.prod(shape[axis + 1 :])
        block[axis] = min(shape[axis], max(1, BLOCK_BYTES // per_item))
        if per_item <= BLOCK_BYTES:
            break
    return tuple(block)


def blocks(shape: Sequence[int], itemsize: int) -> Iterator[Index]:
    """Indices of the blocks of `block_shape` that cover an array."""
    steps = block_shape(shape, itemsize)
    starts = [range(0, n, step) for n, step in zip(shape, steps, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(a, min(a + s, n)) for a, s, n in zip(corner, steps, shape, strict=True))
