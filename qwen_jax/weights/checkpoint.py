"""Every source of weights behind one interface: the leaves of our parameter tree, read slice by slice."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.weights import gguf
from qwen_jax.weights.names import Leaf, Style, leaves
from qwen_jax.weights.stored import PLAIN_DTYPES, StoredTensor

if TYPE_CHECKING:
    from qwen_jax.tokenizer import Tokenizer

Index = tuple[slice, ...]

BLOCK_BYTES = 32 << 20  # how much is read, decoded or written at a time

# what besides weights makes a model folder usable; code files only matter to Qwen1's remote code
_ASSETS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "qwen.tiktoken", "chat_template.jinja", "chat_template.json", "*.py",
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

    @abc.abstractmethod
    def _read(self, path: str, index: Index, out: np.ndarray) -> None: ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights. Raises InputError when there is none."""
        from qwen_jax.tokenizer import load_tokenizer

        return load_tokenizer(self.source)

    def generation_config(self) -> dict[str, Any]:
        """The mapping of generation_config.json (token ids, sampling defaults); empty when there is none."""
        file = self.source / "generation_config.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise InputError(f"{file} is not valid JSON ({error}); download it again.") from None

    @abc.abstractmethod
    def write_assets(self, folder: Path) -> None:
        """Puts the tokenizer's files and generation_config.json into `folder`, as far as there are any."""


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens "default" (the default model), a local folder, a .gguf file, or a Hugging Face id like "Qwen/Qwen2.5-0.5B".

    A folder holds config.json beside safetensors or pytorch_model.bin files (single or with an index), or is an Orbax
    checkpoint that we wrote. Weights are checked against the configuration but not read. Raises InputError when the
    model does not exist, is incomplete, or its tensors do not match its configuration.
    """
    path = Path(model)
    if str(model) == "default":
        from qwen_jax.weights.default_model import default_model

        path = default_model()
    elif not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or path.suffix == ".gguf":
            raise InputError(
                f"{model} does not exist; give a model folder, a .gguf file, 'default' or an id like Qwen/Qwen2-0.5B."
            )
        path = _download(str(model))
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path} is a file but not a .gguf; give the folder that holds it.")
        return GgufCheckpoint(path)
    if (path / "_METADATA").exists():
        from qwen_jax.weights.orbax import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    return _open_folder(path)


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
        names = {leaf.path: [leaf.tensor.format(*index) for index in leaf.indices()] for leaf in self.leaves}
        used = set(itertools.chain.from_iterable(names.values()))
        if missing := [name for name in used if name not in tensors]:
            raise InputError(f"{source} lacks the tensor {_first_of(missing)}; it is incomplete, download it again.")
        if extra := [name for name in tensors if name not in used]:
            raise InputError(
                f"{source} holds the tensor {_first_of(extra)}, which is not part of a {config.model_type}."
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
                if tensor.strides is None:
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

    def write_assets(self, folder: Path) -> None:
        copy_assets(self.source, folder)


def _first_of(names: Sequence[str]) -> str:
    return min(names) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def copy_assets(source: Path, folder: Path) -> None:
    """Copies tokenizer files, generation_config.json and Qwen1's code files from one model folder to another."""
    for pattern in _ASSETS:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def read_hf_extra(folder: Path) -> dict[str, Any]:
    """The keys of a folder's config.json that ModelConfig does not hold but an export should keep."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> TensorCheckpoint:
    config = load_config(folder)
    tensors = _folder_tensors(folder)
    # buffers that old files store; both are functions of the configuration
    tensors = {k: v for k, v in tensors.items() if not k.endswith((".rotary_emb.inv_freq", ".attn.masked_bias"))}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        embedding = leaves(config, "hf")[0].tensor
        if embedding in tensors and not _equal(tensors[embedding], tensors["lm_head.weight"]):
            # the head was trained apart from the embedding, so it counts
            config = dataclasses.replace(config, tie_word_embeddings=False)
        else:
            del tensors["lm_head.weight"]
    return TensorCheckpoint(folder, config, tensors, "hf", hf_extra=read_hf_extra(folder))


def _folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    from qwen_jax.weights.torch_bin import read_torch_bin

    for stem, suffix, read in (("model", "safetensors", read_safetensors), ("pytorch_model", "bin", read_torch_bin)):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            return _sharded(index, read)
        if (folder / f"{stem}.{suffix}").exists():
            return read(folder / f"{stem}.{suffix}")
    raise InputError(
        f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin, an index of either, or our Orbax."
    )


def _sharded(index: Path, read: Any) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError):
        raise InputError(f"{index} is not a valid index of shards; download it again.") from None
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if not (index.parent / name).exists()]:
        raise InputError(f"{index.parent} lacks the shard {_first_of(missing)} named in {index.name}; download it.")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        tensors |= read(index.parent / shard)
    return tensors


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape:
        return False
    step = max(1, BLOCK_BYTES // (4 * a.shape[1]))
    for start in range(0, a.shape[0], step):
        stop = min(start + step, a.shape[0])
        (_, _, x), (_, _, y) = next(a.rows(start, stop)), next(b.rows(start, stop))
        if not np.array_equal(x, y):
            return False
    return True


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name. Raises InputError when it is damaged or truncated."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise InputError(f"{path} is damaged or truncated ({size} bytes); download it again.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is damaged: its header is not a safetensors header; download it again.") from None
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        tensors[name] = tensor = StoredTensor(path, 8 + length + begin, shape, dtype)
        if tensor.num_bytes != end - begin:
            raise InputError(f"{path} is damaged: tensor {name} has not the bytes of its shape; download it again.")
        if tensor.offset + tensor.num_bytes > size:
            raise InputError(
                f"{path} is truncated: tensor {name} ends at byte {tensor.offset + tensor.num_bytes}, "
                f"but the file has {size}; download it again."
            )
    return tensors


def _download(repo: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.txt", "*.tiktoken", "*.jinja", "*.py"]
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=[*patterns, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(repo, allow_patterns=[*patterns, "*.bin"])
        return folder
    except RepositoryNotFoundError:
        reason = "Hugging Face has no such public model"
    except LocalEntryNotFoundError:
        reason = "Hugging Face cannot be reached and it is not in the local cache"
    except Exception as error:  # the library under huggingface_hub, and so what it raises, differs by version
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    raise InputError(f"{repo} is not a local path, and cannot be downloaded: {reason}; check name and connection.")


# --- GGUF -------------------------------------------------------------------------------------------------------------


class GgufCheckpoint(TensorCheckpoint):
    """A GGUF file; converted to bfloat16 by default, the dtype that its weights were quantised from."""

    def __init__(self, path: Path) -> None:
        self._metadata, tensors = gguf.read_gguf(path)
        try:
            config = gguf.config_from_gguf(self._metadata, tensors)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        ids = {key: self._metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in keys.items()}
        ids = {key: id for key, id in ids.items() if id is not None}
        super().__init__(path, config, tensors, "gguf", hf_extra=ids, dtype=np.dtype(ml_dtypes.bfloat16))

    def tokenizer(self) -> Tokenizer:
        from qwen_jax.tokenizer import Tokenizer

        return Tokenizer.from_gguf_metadata(self._metadata)

    def generation_config(self) -> dict[str, Any]:
        return gguf.generation_config(self.config, self._metadata)

    def write_assets(self, folder: Path) -> None:
        if "tokenizer.ggml.model" in self._metadata:
            self.tokenizer().save(folder)
        if generation := self.generation_config():
            (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
