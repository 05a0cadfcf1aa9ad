"""Small models with random weights, made without our own code where something independent can make them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax.config import ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)

HF_COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 3,
    "eos_token_id": 5,
}
HF_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
HF_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": HF_COMMON | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_moe": HF_COMMON | HF_MOE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64},
    "qwen3": HF_COMMON | {"model_type": "qwen3", "head_dim": 32},
    "qwen3_moe": HF_COMMON | HF_MOE | {"model_type": "qwen3_moe", "head_dim": 32, "norm_topk_prob": True},
}
QWEN1_CONFIG = {
    "model_type": "qwen",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "intermediate_size": 192,  # both branches together
    "max_position_embeddings": 512,
    "seq_length": 512,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
}


def qwen1_state(dtype: np.dtype = BF16) -> dict[str, np.ndarray]:
    """A Qwen1 state dict by the names of the released modeling_qwen.py."""
    rng = np.random.default_rng(1)

    def new(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    d, f, v = 64, 96, 96
    state = {"transformer.wte.weight": new(v, d)}
    for i in range(3):
        state |= {
            f"transformer.h.{i}.ln_1.weight": new(d),
            f"transformer.h.{i}.attn.c_attn.weight": new(3 * d, d),
            f"transformer.h.{i}.attn.c_attn.bias": new(3 * d),
            f"transformer.h.{i}.attn.c_proj.weight": new(d, d),
            f"transformer.h.{i}.ln_2.weight": new(d),
            f"transformer.h.{i}.mlp.w1.weight": new(f, d),
            f"transformer.h.{i}.mlp.w2.weight": new(f, d),
            f"transformer.h.{i}.mlp.c_proj.weight": new(d, f),
        }
    return state | {"transformer.ln_f.weight": new(d), "lm_head.weight": new(v, d)}


def hf_state(model_type: str, dtype: np.dtype = BF16) -> dict[str, np.ndarray]:
    """A random state dict by the names that `transformers` writes."""
    rng = np.random.default_rng(2)
    c = HF_CONFIGS[model_type]
    d, v, f = c["hidden_size"], c["vocab_size"], c["intermediate_size"]
    h = c.get("head_dim", d // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * h, c["num_key_value_heads"] * h

    def new(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    state = {"model.embed_tokens.weight": new(v, d), "model.norm.weight": new(d)}
    if not c["tie_word_embeddings"]:
        state["lm_head.weight"] = new(v, d)
    for i in range(c["num_hidden_layers"]):
        layer = {"input_layernorm.weight": new(d), "post_attention_layernorm.weight": new(d)}
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            layer[f"self_attn.{name}_proj.weight"] = new(rows, d)
            if model_type.startswith("qwen2"):
                layer[f"self_attn.{name}_proj.bias"] = new(rows)
        layer["self_attn.o_proj.weight"] = new(d, q)
        if model_type.startswith("qwen3"):
            layer |= {"self_attn.q_norm.weight": new(h), "self_attn.k_norm.weight": new(h)}
        branches = {"mlp": f}
        if "num_experts" in c:
            branches = {f"mlp.experts.{e}": c["moe_intermediate_size"] for e in range(c["num_experts"])}
            layer["mlp.gate.weight"] = new(c["num_experts"], d)
            if model_type == "qwen2_moe":
                branches["mlp.shared_expert"] = c["shared_expert_intermediate_size"]
                layer["mlp.shared_expert_gate.weight"] = new(1, d)
        for prefix, width in branches.items():
            layer |= {f"{prefix}.{name}_proj.weight": new(width, d) for name in ("gate", "up")}
            layer[f"{prefix}.down_proj.weight"] = new(d, width)
        state |= {f"model.layers.{i}.{name}": value for name, value in layer.items()}
    return state


def write_folder(folder: Path, config: dict[str, Any], state: dict[str, np.ndarray]) -> Path:
    """A model folder whose safetensors file is written by the safetensors library."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_state(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by the safetensors library."""
    from safetensors.numpy import load_file

    state: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def assert_bit_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert sorted(a) == sorted(b)
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.tobytes() == y.tobytes(), name


def model_config(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_hf(config)
