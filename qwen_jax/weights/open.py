"""From the name of a model to its weights: the default model, a folder, a GGUF file or a Hugging Face id."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from qwen_jax import hf_quantisation
from qwen_jax.checked import printable, read_json, shown
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.local_path import local_path
from qwen_jax.weights import gguf
from qwen_jax.weights.checkpoint import BLOCK_BYTES, Checkpoint, TensorCheckpoint, first_of, read_hf_extra
from qwen_jax.weights.names import leaves
from qwen_jax.weights.quantised import assemble
from qwen_jax.weights.safetensors import read_safetensors
from qwen_jax.weights.stored import StoredTensor

if TYPE_CHECKING:
    from qwen_jax.tokenizer import Tokenizer


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens "default" (the default model), a local folder, a .gguf file, or a Hugging Face id like "Qwen/Qwen2.5-0.5B".

    A folder holds config.json beside safetensors or pytorch_model.bin files (single or with an index), or is an Orbax
    checkpoint that we wrote. Weights are checked against the configuration but not read. Raises InputError when the
    model does not exist, is incomplete, or its tensors do not match its configuration.
    """
    path = local_path(model)
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


def _open_folder(folder: Path) -> TensorCheckpoint:
    config = load_config(folder)
    tensors: dict[str, Any] = _folder_tensors(folder)
    if quantisation := hf_quantisation.parse(read_json(folder / "config.json").get("quantization_config")):
        tensors = assemble(folder, tensors, quantisation)
    # buffers that old files store; both are functions of the configuration
    tensors = {k: v for k, v in tensors.items() if not k.endswith((".rotary_emb.inv_freq", ".attn.masked_bias"))}
    by_path = {leaf.path: leaf for leaf in leaves(dataclasses.replace(config, tie_word_embeddings=False), "hf")}
    embedding, head = (by_path[path] for path in ("embed/embedding", "lm_head/embedding"))
    prefix, _, bare = embedding.tensor.partition(".")
    if bare in tensors:  # saved without the head, whose model gives the others their prefix
        tensors = {k if k == head.tensor else f"{prefix}.{k}": v for k, v in tensors.items()}
    if config.tie_word_embeddings and head.tensor in tensors:
        if embedding.tensor not in tensors:
            tensors[embedding.tensor] = tensors.pop(head.tensor)
        elif _equal(tensors[embedding.tensor], tensors[head.tensor]):
            del tensors[head.tensor]
        else:  # the head was trained apart from the embedding, so it counts
            config = dataclasses.replace(config, tie_word_embeddings=False)
    return TensorCheckpoint(folder, config, tensors, "hf", hf_extra=read_hf_extra(folder))


# in the order in which transformers looks for them
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    from qwen_jax.weights.torch_bin import read_torch_bin

    named = read_json(folder / "config.json").get("transformers_weights")
    for file in (named,) if named else _WEIGHT_FILES:
        path = _inside(folder, file, "transformers_weights in config.json")
        if os.path.isfile(path):  # of a name of any length too
            read = read_torch_bin if ".bin" in file else read_safetensors
            return _sharded(path, read) if file.endswith(".index.json") else read(path)
    expected = printable(named) if named else "model.safetensors or pytorch_model.bin, an index of either"
    raise InputError(f"{folder} holds no weights; expected {expected}, or our Orbax.")


def _inside(folder: Path, name: object, where: str) -> Path:
    """The file that a name from a file means. Raises InputError unless it lies in the folder (as a link, maybe)."""
    if not isinstance(name, str) or not name.isprintable() or name[:1] == "/" or ".." in PurePosixPath(name).parts:
        raise InputError(f"{where} names {shown(name)}, which is not a file in {folder}; download it again.")
    return folder / name


def _sharded(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} is not a valid index of shards; download it again.")
    paths = {_inside(index.parent, name, str(index)) for name in weight_map.values()}
    if missing := [printable(str(path.relative_to(index.parent))) for path in paths if not os.path.isfile(path)]:
        raise InputError(f"{index.parent} lacks the shard {first_of(missing)} named in {index.name}; download it.")
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(paths):
        tensors |= read(path)
    return tensors


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape or len(a.shape) != 2 or not a.shape[1]:
        return False
    step = max(1, BLOCK_BYTES // (4 * a.shape[1]))
    for start in range(0, a.shape[0], step):
        stop = min(start + step, a.shape[0])
        (_, _, x), (_, _, y) = next(a.rows(start, stop)), next(b.rows(start, stop))
        if not np.array_equal(x, y):
            return False
    return True


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
