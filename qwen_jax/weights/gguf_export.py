"""Weights out: a GGUF file that llama.cpp and Ollama run, written tensor by tensor."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import ml_dtypes
import numpy as np

from qwen_jax.config import DynamicNtkScaling, LinearScaling, ModelConfig, YarnScaling
from qwen_jax.errors import InputError
from qwen_jax.leaves.encode import encode
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.weights._files import new_file, progress_bar
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.dequant import BLOCK_FORMATS
from qwen_jax.weights.export import Tensor, plan
from qwen_jax.weights.gguf import MODEL_TYPES

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q4_k_m", "q4_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
# llama.cpp's number of each, and what most of its matrices are stored as
_FILE_TYPES = {
    "f32": (0, "F32"), "f16": (1, "F16"), "bf16": (32, "BF16"), "q8_0": (7, "Q8_0"), "q6_k": (18, "Q6_K"),
    "q4_k_m": (15, "Q4_K"), "q4_0": (2, "Q4_0"),
}  # fmt: skip
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# for rows that blocks of 256 do not divide
_SMALLER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5


class Errors(NamedTuple):
    """What rounding did to the tensors of one kind."""

    kind: str  # "ffn_down"
    formats: str  # "Q4_K, Q6_K"
    relative: float  # |rounded - exact| / |exact|, both over all of them


def save_gguf(checkpoint: Checkpoint, path: str | Path, type: GgufType, *, progress: bool = True) -> list[Errors]:
    """Writes `path`, which must end in .gguf, with metadata, tokenizer and chat template; returns what was lost.

    Which tensor is stored as what is llama.cpp's own choice for the type. Memory stays at one tensor. Raises InputError
    when the file exists or cannot be written, or when the gguf package is missing.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        raise InputError(f"{path} must end in .gguf, by which other tools know such a file.")
    try:
        import gguf
    except ImportError:
        raise InputError("writing GGUF needs the gguf package; `pip install gguf`.") from None
    tensors = plan(checkpoint, np.float32, style="gguf")
    stored = {name: _format(name, tensor, type, checkpoint.config) for name, tensor in tensors.items()}
    architecture = next(name for name, kind in MODEL_TYPES.items() if kind == checkpoint.config.model_type)
    lost: dict[str, list[tuple[str, float, float]]] = {}
    total = sum(tensor.num_bytes for tensor in tensors.values())
    with (
        new_file(path) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, architecture)) as writer,
        progress_bar("writing", total, show=progress) as advance,
    ):
        _describe(writer, checkpoint, type, path.stem)
        for name, tensor in tensors.items():
            quantised = stored[name] in BLOCK_FORMATS
            shape = _byte_shape(tensor.shape, stored[name]) if quantised else tensor.shape
            dtype = np.dtype(np.uint8) if quantised else _PLAIN[stored[name]]
            kind = gguf.GGMLQuantizationType[stored[name]]
            writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            pieces, error, norm = [], 0.0, 0.0
            for values in tensor.blocks(checkpoint):
                values = values.reshape(-1, tensor.shape[-1] if len(tensor.shape) > 1 else values.size)
                written, exact = _rounded(values, stored[name])
                error += float(np.square(exact - values, dtype=np.float64).sum())
                norm += float(np.square(values, dtype=np.float64).sum())
                pieces.append(written)
                advance(values.nbytes)
            writer.write_tensor_data(np.concatenate(pieces, axis=-1 if len(tensor.shape) == 1 else 0))
            lost.setdefault(_kind(name), []).append((stored[name], error, norm))
    return [
        Errors(kind, ", ".join(sorted({f for f, *_ in each})), math.sqrt(sum(e for _, e, _ in each) / norm))
        for kind, each in lost.items()
        if (norm := sum(n for *_, n in each))
    ]


def _kind(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def _byte_shape(shape: Sequence[int], format: str) -> tuple[int, ...]:
    block = BLOCK_FORMATS[format]
    return (*shape[:-1], shape[-1] // block.block_size * block.block_bytes)


def _rounded(values: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, K] as it is stored, and the values which that stands for."""
    if format in _PLAIN:
        stored = values.astype(_PLAIN[format])
        return stored, stored.astype(np.float32)
    stored, block = encode(values, format), BLOCK_FORMATS[format]
    exact = np.empty((values.size // block.block_size, block.block_size), np.float32)
    block.decode(stored.reshape(-1, block.block_bytes), exact)
    return stored, exact.reshape(values.shape)


# --- which format -----------------------------------------------------------------------------------------------------


def _format(name: str, tensor: Tensor, type: GgufType, config: ModelConfig) -> str:
    """How llama.cpp's quantiser stores a tensor (`llama_tensor_get_type`); vectors and routers stay float32."""
    default = _FILE_TYPES[type][1]
    kind = _kind(name)
    if len(tensor.shape) == 1 or kind == "ffn_gate_inp":
        return "F32"
    if default in _PLAIN:
        return default
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    format = default
    if kind == "output" or (kind == "token_embd" and config.tie_word_embeddings):
        format = "Q8_0" if type == "q8_0" else "Q6_K"
    elif type == "q4_k_m":
        if kind.startswith("ffn_down") and more_bits(layer, config.num_layers):
            format = "Q6_K"
        elif kind == "attn_v":
            # heads of the models of 80 layers share values, so that more bits cost little there
            shared = config.num_layers == 80 and config.num_kv_heads < config.num_heads
            format = "Q6_K" if more_bits(layer, config.num_layers) else "Q5_K" if shared else "Q4_K"
        elif kind == "attn_qkv":
            format = "Q5_K"
    if tensor.shape[-1] % BLOCK_FORMATS[format].block_size:
        format = _SMALLER.get(format, "F16")
    return format if tensor.shape[-1] % 32 == 0 else "F16"


def more_bits(layer: int, num_layers: int) -> bool:
    """Whether Q4_K_M spends more bits in a layer: the first and last eighth, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


# --- metadata ---------------------------------------------------------------------------------------------------------


def unsaid(config: ModelConfig) -> list[str]:
    """What of a model GGUF has no words for, so that other tools compute without it."""
    return [
        name
        for name, there in {
            "dynamic NTK": isinstance(config.rope_scaling, DynamicNtkScaling),
            "LogN attention": config.logn_trained_length is not None,
            "Dual Chunk Attention": config.dual_chunk is not None,
            "sliding windows": any(config.layer_windows()),
        }.items()
        if there
    ]


def warn_of_unsaid(config: ModelConfig) -> None:
    """Says on stderr what other tools will compute without."""
    if names := unsaid(config):
        message = f"GGUF has no words for {' and '.join(names)}: within the trained length nothing changes, beyond it"
        print(f"qwen-jax: {message} other tools answer differently.", file=sys.stderr)


def _describe(writer: Any, checkpoint: Checkpoint, type: GgufType, name: str) -> None:
    c = checkpoint.config
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[type][0])
    writer.add_quantization_version(2)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size * (2 if c.model_type == "qwen" else 1))
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    if c.model_type == "qwen":
        writer.add_rope_dimension_count(c.head_dim)
    if c.moe:
        writer.add_expert_count(c.moe.num_experts)
        writer.add_expert_used_count(c.moe.top_k)
        writer.add_expert_feed_forward_length(c.moe.expert_intermediate_size)
        writer.add_expert_weights_norm(c.moe.norm_topk_prob)
        if c.moe.shared_intermediate_size:
            writer.add_expert_shared_feed_forward_length(c.moe.shared_intermediate_size)
    match c.rope_scaling:
        case LinearScaling():
            writer.add_rope_scaling_type(_scaling_type("LINEAR"))
            writer.add_rope_scaling_factor(c.rope_scaling.factor)
        case YarnScaling():
            writer.add_rope_scaling_type(_scaling_type("YARN"))
            writer.add_rope_scaling_factor(c.rope_scaling.factor)
            writer.add_rope_scaling_orig_ctx_len(c.rope_scaling.original_length)
            writer.add_rope_scaling_yarn_beta_fast(c.rope_scaling.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(c.rope_scaling.beta_slow)
    _add_tokenizer(writer, checkpoint.tokenizer(), c.vocab_size)


def _scaling_type(name: str) -> Any:
    from gguf import RopeScalingType

    return RopeScalingType[name]


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, num_rows: int) -> None:
    if tokenizer.is_byte_level:
        model, added = tokenizer.vocabulary()
        tokens, types = [f"[PAD{id}]" for id in range(num_rows)], [_UNUSED] * num_rows
        for id, text, kind in _tokens(model["vocab"], added):
            tokens[id], types[id] = text, kind
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    else:
        pieces = tokenizer.pieces()
        more = range(len(pieces), num_rows)
        tokens = [*(piece.text for piece in pieces), *(f"[PAD{id}]" for id in more)]
        types = [*(piece.kind for piece in pieces), *(_UNUSED for _ in more)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([*(piece.score for piece in pieces), *(-1e4 for _ in more)])
        writer.add_add_space_prefix(tokenizer.drops_first_space)
        writer.add_unk_token_id(types.index(_UNKNOWN))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_eos_token_id(tokenizer.eos_ids[0])
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_bos_token_id(tokenizer.end_of_text_id)
    writer.add_add_bos_token(False)
    template = tokenizer.chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif template is not None:
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])


def _tokens(vocab: dict[str, int], added: Sequence[dict[str, Any]]) -> Iterator[tuple[int, str, int]]:
    for text, id in vocab.items():
        yield id, text, _NORMAL
    for token in added:
        yield token["id"], token["content"], _CONTROL if token["special"] else _USER_DEFINED
