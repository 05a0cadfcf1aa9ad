"""GGUF files (llama.cpp's format, versions 2 and 3): metadata, tensors, and the ModelConfig that they describe."""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.checked import MAX_LAYERS, flag, number, printable, shown, whole
from qwen_jax.config import LinearScaling, ModelConfig, ModelType, MoeConfig, RopeScaling, YarnScaling
from qwen_jax.errors import InputError
from qwen_jax.weights.stored import StoredTensor

# value type code -> struct format; 8 is a string and 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip

MODEL_TYPES: dict[str, ModelType] = {
    "qwen": "qwen", "qwen2": "qwen2", "qwen2moe": "qwen2_moe", "qwen3": "qwen3", "qwen3moe": "qwen3_moe",
}  # fmt: skip


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The key-value metadata of a GGUF file. Raises InputError when it is not one or is damaged."""
    return read_gguf(path)[0]


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata, and tensors by name (shapes as PyTorch has them, [out, in]); the parts of a split file are joined.

    Raises InputError when a file is missing, not GGUF, damaged or truncated.
    """
    path = Path(path)
    metadata, tensors = _read_file(path)
    count = whole(f"{path}: GGUF key 'split.count'", metadata.get("split.count", 0), least=0)
    if count > 1:
        match = re.fullmatch(r"(.*)-00001-of-\d{5}", path.stem)
        if not match:
            raise InputError(f"{path} is not the first part of a split GGUF; give …-00001-of-{count:05}.gguf.")
        for part in range(2, count + 1):
            sibling = path.with_name(f"{match[1]}-{part:05}-of-{count:05}.gguf")
            tensors |= _read_file(sibling)[1]
        declared = metadata.get("split.tensors.count", len(tensors))
        if len(tensors) != declared:
            raise InputError(
                f"{path} and its parts hold {len(tensors)} tensors, not {shown(declared)}; get them again."
            )
    return metadata, tensors


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path, or download the file.") from None
    except (struct.error, UnicodeDecodeError, MemoryError, OverflowError):
        raise InputError(f"{path} is damaged or truncated ({path.stat().st_size} bytes); download it again.") from None
    except (ValueError, OSError) as error:  # mmap refuses an empty file with ValueError
        raise InputError(f"{path} cannot be read ({error}); download it again.") from None


def _parse(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if data[:4] != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")
    version, num_tensors, num_keys = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise InputError(f"{path} has GGUF version {version}; little-endian files of versions 2 and 3 are read.")
    at = 24
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key, at = _string(data, at)
        if key in metadata:
            raise InputError(f"{path} is damaged: it has the key {shown(key)} twice; download it again.")
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)

    headers = []
    for _ in range(num_tensors):
        name, at = _string(data, at)
        (rank,) = struct.unpack_from("<I", data, at)
        if rank > 4:
            raise struct.error("GGUF tensors have at most four axes")
        *dims, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, at + 4)
        at += 4 + 8 * rank + 12
        headers.append((name, tuple(reversed(dims)), kind, offset))

    alignment = whole(f"{path}: GGUF key 'general.alignment'", metadata.get("general.alignment", 32), most=1 << 20)
    start = end = -(-at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in sorted(headers, key=lambda header: header[-1]):
        tensor = StoredTensor(path, start + offset, shape, _TENSOR_TYPES.get(kind, f"code {kind}"))
        if tensor.offset < end or name in tensors:
            raise InputError(f"{path} is damaged: tensor {printable(name)} lies over another one; download it again.")
        end = tensor.offset + tensor.num_bytes
        if end > len(data):
            raise InputError(
                f"{path} is truncated: tensor {printable(name)} ends at byte {end}, but the file has {len(data)}; "
                "download it again."
            )
        tensors[name] = tensor
    return metadata, tensors


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise struct.error("string beyond the end of the file")
    return data[at + 8 : end].decode(), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, at)
    if kind == _ARRAY:
        element, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if element in _SCALARS:
            end = at + count * struct.calcsize(_SCALARS[element])
            return list(struct.unpack_from(f"<{count}{_SCALARS[element]}", data, at)), end
        if element != _STRING:
            raise struct.error(f"array of unknown value type {element}")
        values = []
        for _ in range(count):
            value, at = _string(data, at)
            values.append(value)
        return values, at
    if kind not in _SCALARS:
        raise struct.error(f"unknown value type {kind}")
    (value,) = struct.unpack_from(f"<{_SCALARS[kind]}", data, at)
    if kind == 6:
        value = float(str(np.float32(value)))  # 1e-06, as in config.json, rather than 9.999999974752427e-07
    return value, at + struct.calcsize(_SCALARS[kind])


# --- metadata -> ModelConfig ------------------------------------------------------------------------------------------

# Keys under `<arch>.` that are read below, and those that only repeat what the tensors or the architecture say
_READ_KEYS = frozenset(
    """block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.layer_norm_rms_epsilon attention.key_length attention.value_length rope.freq_base rope.dimension_count
    rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.yarn_beta_fast
    rope.scaling.yarn_beta_slow expert_count expert_used_count expert_weights_norm expert_gating_func""".split()
)
_IMPLIED_KEYS = frozenset(
    """expert_feed_forward_length expert_shared_feed_forward_length vocab_size rope.scaling.finetuned
    use_parallel_residual attention.layer_norm_epsilon attention.causal tensor_data_layout""".split()
)


def config_from_gguf(metadata: dict[str, Any], tensors: dict[str, StoredTensor]) -> ModelConfig:
    """The ModelConfig that a GGUF's metadata and tensor shapes state. Raises InputError on anything unknown.

    A GGUF says nothing of Qwen1's dynamic NTK and LogN, so a Qwen1 model has neither.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in MODEL_TYPES:
        raise InputError(f"GGUF architecture {shown(arch)} is not a Qwen text model; known: {', '.join(MODEL_TYPES)}.")
    keys = {k.removeprefix(f"{arch}."): v for k, v in metadata.items() if k.startswith(f"{arch}.")}
    if unknown := sorted(set(keys) - _READ_KEYS - _IMPLIED_KEYS):
        name = shown(f"{arch}.{unknown[0]}")
        raise InputError(f"unknown GGUF key {name} = {shown(keys[unknown[0]])}; it may change the network.")

    def need(name: str) -> Any:
        if name not in keys:
            raise InputError(f"the GGUF lacks the metadata key '{arch}.{name}'; download it again.")
        if isinstance(keys[name], list):
            raise InputError(f"GGUF key '{arch}.{name}' differs by layer, which no Qwen text model does.")
        return keys[name]

    def size(name: str, default: int | None = None, **limits: int) -> int:
        value = default if default is not None and name not in keys else need(name)
        return whole(f"GGUF key '{arch}.{name}'", value, **limits)

    def rows(name: str, axis: int) -> int:
        if name not in tensors or len(tensors[name].shape) < 2:
            raise InputError(f"the GGUF lacks the tensor {name}; download it again.")
        return whole(f"a size of tensor {name}", tensors[name].shape[axis])

    hidden, heads = size("embedding_length"), size("attention.head_count")
    ff = size("feed_forward_length", least=2)
    head_dim = size("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.get(name, head_dim) != head_dim:
            raise InputError(
                f"GGUF key '{arch}.{name}' is {shown(keys[name])}, but heads are {head_dim} wide; they must agree."
            )
    moe = None
    if arch.endswith("moe"):
        softmax = 1
        if keys.get("expert_gating_func", softmax) != softmax:
            raise InputError(f"GGUF key '{arch}.expert_gating_func' is not softmax, which every Qwen's router uses.")
        moe = MoeConfig(
            num_experts=size("expert_count"),
            top_k=size("expert_used_count"),
            expert_intermediate_size=rows("blk.0.ffn_gate_exps.weight", -2),
            shared_intermediate_size=rows("blk.0.ffn_gate_shexp.weight", 0) if arch == "qwen2moe" else 0,
            # seldom in the metadata: llama.cpp fixes it by architecture
            norm_topk_prob=flag(
                f"GGUF key '{arch}.expert_weights_norm'", keys.get("expert_weights_norm", arch == "qwen3moe")
            ),
        )
    return ModelConfig(
        model_type=MODEL_TYPES[arch],
        vocab_size=rows("token_embd.weight", 0),
        hidden_size=hidden,
        num_layers=size("block_count", most=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=ff // 2 if arch == "qwen" else ff,
        max_position_embeddings=size("context_length"),
        rms_norm_eps=number(
            f"GGUF key '{arch}.attention.layer_norm_rms_epsilon'", need("attention.layer_norm_rms_epsilon"), most=1.0
        ),
        rope_theta=number(f"GGUF key '{arch}.rope.freq_base'", keys.get("rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(arch, keys),
        tie_word_embeddings="output.weight" not in tensors,
        moe=moe,
    )


def _rope_scaling(arch: str, keys: dict[str, Any]) -> RopeScaling | None:
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(f"GGUF rope.scaling.type {shown(kind)} is not supported; known: none, linear, yarn.")
    prefix = f"GGUF key '{arch}.rope.scaling."
    factor = number(f"{prefix}factor'", keys.get("rope.scaling.factor", 0), least=1.0)
    if kind == "linear":
        return LinearScaling(factor)
    original = whole(f"{prefix}original_context_length'", keys.get("rope.scaling.original_context_length"))
    betas = {
        f"beta_{x}": number(f"{prefix}yarn_beta_{x}'", keys[k])
        for x in ("fast", "slow")
        if (k := f"rope.scaling.yarn_beta_{x}") in keys
    }
    return YarnScaling(factor=factor, original_length=original, **betas)


def generation_config(config: ModelConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    """The family's published `generation_config.json`, which a GGUF does not carry; empty without a vocabulary.

    A model that ends on <|im_end|> is a chat model, one that ends on <|endoftext|> a base model.
    """
    tokens, eos = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.eos_token_id")
    if eos is None or "<|endoftext|>" not in tokens:
        return {}
    endoftext = tokens.index("<|endoftext|>")
    chat = eos != endoftext
    out: dict[str, Any] = {"bos_token_id": endoftext, "pad_token_id": endoftext}
    out["eos_token_id"] = [eos, endoftext] if chat else eos
    if config.model_type == "qwen":
        return out | {"do_sample": True, "top_p": 0.8, "top_k": 0, "max_new_tokens": 512}
    if not chat:
        return out | {"do_sample": False, "max_new_tokens": 2048}
    if config.model_type in ("qwen3", "qwen3_moe"):
        return out | {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    penalty = 1.1 if config.num_params() < 2e9 else 1.05  # the 0.5B and 1.5B models ask for more
    return out | {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": penalty}
