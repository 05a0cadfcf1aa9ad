"""Weights out: a Hugging Face folder that `transformers` loads, written tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.weights._files import new_folder, progress_bar
from qwen_jax.weights.checkpoint import Checkpoint, blocks
from qwen_jax.weights.names import Leaf, Style, leaves
from qwen_jax.weights.stored import CODE_DTYPES, PLAIN_DTYPES

MAX_SHARD_BYTES = 5 * 10**9
_SAFETENSORS_NAMES = {dtype: name for name, dtype in (PLAIN_DTYPES | CODE_DTYPES).items()}


def save_hf(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes config.json, safetensors (sharded beyond `max_shard_bytes`), tokenizer and generation config to `folder`.

    `dtype` casts every tensor (default: as the checkpoint says). Memory stays at one block of BLOCK_BYTES. Qwen1 keeps
    Qwen1's names and configuration. Raises InputError when the folder exists or cannot be written.
    """
    tensors = plan(checkpoint, dtype)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    with new_folder(Path(folder)) as out, progress_bar("writing", total, show=progress) as advance:
        for name, block in write_tensors(out, tensors, max_shard_bytes):
            for values in tensors[name].blocks(checkpoint):
                block(values)
                advance(values.nbytes)
        stored = {tensor.dtype.name for tensor in tensors.values()}
        write_config(checkpoint, out, "float32" if len(stored) > 1 else stored.pop())


def write_tensors(
    folder: Path, tensors: Mapping[str, Written], max_shard_bytes: int = MAX_SHARD_BYTES
) -> Iterator[tuple[str, Callable[[np.ndarray], Any]]]:
    """Writes model.safetensors, or several with an index. Yields each name, in order, with what takes its values.

    Values may come piece by piece, in the order of rows.
    """
    shards: list[dict[str, Written]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.num_bytes for t in shards[-1].values()) + tensor.num_bytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    for file_name, shard in zip(names, shards, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(_header(shard))
            for name in shard:
                yield name, lambda values, file=file: file.write(values.reshape(-1).view(np.uint8).data)
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_config(checkpoint: Checkpoint, folder: Path, dtype: str, more: Mapping[str, Any] | None = None) -> None:
    """Writes all of a model folder but the weights: config.json, with `more` keys, tokenizer and generation config."""
    config = checkpoint.config.to_hf() | checkpoint.hf_extra | {"torch_dtype": dtype} | dict(more or {})
    write_json(folder / "config.json", config)
    checkpoint.write_assets(folder)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as `transformers` does: indented, ending in a newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Written:
    """A tensor to be written."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.num_bytes = math.prod(shape) * dtype.itemsize


class Tensor(Written):
    """One of a checkpoint's: the pieces of leaves that make it up, in the order of their rows."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        super().__init__(shape, dtype)
        self.pieces: list[tuple[Leaf, tuple[int, ...]]] = []

    def blocks(self, checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        for leaf, unit in sorted(self.pieces, key=lambda piece: piece[0].first_row):
            for block in blocks(leaf.unit, self.dtype.itemsize):
                shape = [s.stop - s.start for s in block]
                out = np.empty([1] * len(unit) + shape, self.dtype)
                checkpoint.read(leaf.path, (*(slice(i, i + 1) for i in unit), *block), out)
                yield out


def plan(checkpoint: Checkpoint, dtype: Any, style: Style = "hf") -> dict[str, Tensor]:
    """Every tensor that is written, under its name in `style`, in the order of the forward pass."""
    tensors: dict[str, Tensor] = {}
    sections = {"embed": -1.0, "final_norm": math.inf, "lm_head": math.inf}
    depth: dict[str, float] = {}
    for leaf in leaves(checkpoint.config, style):
        for unit in leaf.indices():
            name = leaf.tensor.format(*unit)
            leaf_dtype = np.dtype(dtype) if dtype is not None else checkpoint.dtypes[leaf.path]
            tensors.setdefault(name, Tensor(leaf.file_shape, leaf_dtype)).pieces.append((leaf, unit))
            depth[name] = float(unit[0]) if unit else sections[leaf.path.split("/")[0]]
    return {name: tensors[name] for name in sorted(tensors, key=depth.__getitem__)}


def _header(tensors: Mapping[str, Written]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.num_bytes
        header[name] = {"dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
