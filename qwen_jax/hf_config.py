"""Hugging Face's `config.json`: keys, defaults and precedence as `transformers` has them, architecture by architecture.

Qwen1's are those of its remote code. A key that may change the network and is not known is refused by name; one that
does not (a tool's marker, a feature that is switched off) is passed over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax import hf_keys, hf_quantisation
from qwen_jax.checked import MAX_LAYERS, flag, mapping, number, read_json, shown, whole
from qwen_jax.config import (
    MODEL_TYPES,
    DualChunk,
    DynamicNtkScaling,
    LinearScaling,
    ModelConfig,
    MoeConfig,
    NtkScaling,
    RopeScaling,
    SparsePrefill,
    YarnScaling,
)
from qwen_jax.errors import InputError

_SPARSE_FILE = "sparse_attention_config.json"  # beside config.json in a Qwen2.5-1M folder

_ARCHITECTURES = {
    "qwen": "QWenLMHeadModel",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def with_sparse_file(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The mapping with the sparse attention budgets that Qwen2.5-1M keeps in a file of their own, if there is one."""
    declared, path = config.get("dual_chunk_attention_config"), folder / _SPARSE_FILE
    if not isinstance(declared, Mapping) or "sparse_attention_config" in declared or not path.exists():
        return config
    return {**config, "dual_chunk_attention_config": {**declared, "sparse_attention_config": read_json(path)}}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """See `ModelConfig.from_hf`."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(f"model_type {shown(model_type)} is not a Qwen text model; known: {', '.join(MODEL_TYPES)}.")
    _refuse_unknown(config, model_type)
    c = hf_keys.DEFAULTS[model_type] | dict(config)
    for alias, name in hf_keys.ALIASES.get(model_type, {}).items():
        if alias in config:
            c[name] = config[alias]

    def size(name: str, **limits: int) -> int:
        return whole(name, c.get(name), **limits)

    qwen1, moe = model_type == "qwen", model_type.endswith("_moe")
    heads, hidden, layers = size("num_attention_heads"), size("hidden_size"), size("num_hidden_layers", most=MAX_LAYERS)
    kv_heads = heads
    if not qwen1 and not (c["num_key_value_heads"] is None and not moe):
        kv_heads = size("num_key_value_heads")
    width = "kv_channels" if qwen1 else "head_dim"
    if c.get(width) is None and model_type not in ("qwen", "qwen3"):
        head_dim = whole("hidden_size // num_attention_heads, the head_dim,", hidden // heads)
    else:
        head_dim = size(width)
    theta, scaling = _rope_from_hf(c)
    logn_trained_length = None
    if qwen1:  # both are on in the released code when the file is silent
        if c.get("use_dynamic_ntk", True):
            scaling = DynamicNtkScaling(size("seq_length"))
        if c.get("use_logn_attn", True):
            logn_trained_length = size("seq_length")
    return ModelConfig(
        model_type=model_type,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        # Qwen1 writes the width of gate and up together
        intermediate_size=size("intermediate_size", least=2) // 2 if qwen1 else size("intermediate_size"),
        max_position_embeddings=size("max_position_embeddings"),
        rms_norm_eps=number(name := "layer_norm_epsilon" if qwen1 else "rms_norm_eps", c[name], most=1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=flag("tie_word_embeddings", c.get("tie_word_embeddings", False)),
        logn_trained_length=logn_trained_length,
        windows=_windows_from_hf(c, layers),
        dual_chunk=_dual_chunk_from_hf(c.get("dual_chunk_attention_config")),
        sparse_prefill=_sparse_from_hf(c.get("dual_chunk_attention_config")),
        moe=_moe_from_hf(c) if moe else None,
        initializer_range=number("initializer_range", c.get("initializer_range", 0.02), least=0.0),
    )


def _refuse_unknown(config: Mapping[str, Any], model_type: str) -> None:
    off = hf_keys.OFF_OF[model_type]
    for key, value in config.items():
        if (
            value is None
            or value in ([], {})
            or key in hf_keys.READ
            or key in hf_keys.IGNORED
            or key.startswith(hf_keys.TOOLS)
        ):
            continue
        if key not in off:
            if key in hf_keys.UNREAD:
                continue
            raise InputError(
                f"unknown config key {shown(key)} = {shown(value)}; it may change the network, so it is not ignored: "
                "remove it from config.json if you know that it does not."
            )
        if value != off[key]:
            raise InputError(
                f"{key} = {shown(value)} is not supported; the Qwen models of this kind have {off[key]!r}."
            )
    hf_quantisation.parse(config.get("quantization_config"))
    if model_type.endswith("_moe") and (config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers")):
        raise InputError(
            "decoder_sparse_step != 1 or a filled mlp_only_layers mixes dense and sparse layers, which is not "
            "supported; no released Qwen does."
        )


def _rope_from_hf(c: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling. `rope_scaling` counts before `rope_parameters`, and the base within either before the one
    beside it, as in `PreTrainedConfig.convert_rope_params_to_dict`."""
    if c["model_type"] == "qwen":
        return number("rotary_emb_base", c["rotary_emb_base"]), None
    key = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
    raw = {k: v for k, v in mapping(key, c.get(key) or {}).items() if v is not None}
    theta = number("rope_theta", raw.pop("rope_theta", c.get("rope_theta", 10000.0)))
    if not raw:
        return theta, None
    kinds = [raw.pop(name) for name in ("rope_type", "type") if name in raw]
    kind = kinds[0] if kinds else None
    if not isinstance(kind, str) or kind not in hf_keys.ROPE_KEYS:
        raise InputError(f"{key} type {shown(kind)} is not supported; known: {', '.join(hf_keys.ROPE_KEYS)}.")
    if raw.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{key} partial_rotary_factor is not 1; every Qwen rotates the whole head.")
    if unknown := sorted(set(raw) - hf_keys.ROPE_KEYS[kind]):
        known = ", ".join(sorted(hf_keys.ROPE_KEYS[kind])) or "none"
        raise InputError(f"{key} of type {kind!r} has the unknown key {shown(unknown[0])}; known: {known}.")
    if kind == "default":
        return theta, None
    factor = number(f"{key} factor", raw.pop("factor", None), least=1.0)
    if kind == "linear":
        return theta, LinearScaling(factor)
    if kind == "ntk":
        return theta, NtkScaling(factor)
    if raw.pop("truncate", True) is not True:
        raise InputError(f"{key} truncate=false is not supported; no Qwen uses it.")
    raw.pop("attn_factor", None)  # vLLM's, in DeepSeek-R1-0528-Qwen3-8B; transformers does not read it
    name = "original_max_position_embeddings"
    original = raw.pop(name, c["max_position_embeddings"])
    if c.get(name) is not None:
        original = c[name]
    options = {option: number(f"{key} {option}", value) for option, value in raw.items()}
    return theta, YarnScaling(factor=factor, original_length=whole(f"{key} {name}", original), **options)


def _windows_from_hf(c: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    if (own := c.get("layer_windows")) is not None:  # our key: no released code has Qwen1's windows
        if not isinstance(own, list) or len(own) != layers:
            raise InputError(
                f"layer_windows is {shown(own)}; it must be a list of one size, or null, for each of {layers} layers."
            )
        return tuple(None if size is None else whole("a size in layer_windows", size) for size in own)
    if c["model_type"] == "qwen":
        return ()
    kinds = c.get("layer_types")
    if kinds is not None:
        known = {"full_attention": False, "attention": False, "sliding_attention": True}
        if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(k, str) for k in kinds):
            raise InputError(
                f"layer_types is {shown(kinds)}; it must be a list of one name for each of {layers} layers."
            )
        if unknown := [kind for kind in kinds if kind not in known]:
            raise InputError(f"layer_types has {shown(unknown[0])}, which is not supported; known: {', '.join(known)}.")
        kinds = [known[kind] for kind in kinds]
    used = flag("use_sliding_window", c.get("use_sliding_window", False))
    window = c["sliding_window"] if used else None
    if c["model_type"] == "qwen3_moe":  # where transformers reads no layer_types
        kinds = [window is not None] * layers
    elif kinds is None:
        first = whole("max_window_layers", c["max_window_layers"], least=0) if used else layers
        if c["model_type"] == "qwen2_moe":  # every other layer before that one, rather than all from it on
            kinds = [used and i % 2 == 0 and i < first for i in range(layers)]
        else:
            kinds = [window is not None and i >= first for i in range(layers)]
    if not any(kinds):
        return ()
    if not used:
        raise InputError("layer_types has sliding_attention, but use_sliding_window is false; correct config.json.")
    window = whole("sliding_window", window)
    return tuple(window if sliding else None for sliding in kinds)


def _dual_chunk_from_hf(raw: Any) -> DualChunk | None:
    if raw is None or raw == {}:
        return None
    name = "dual_chunk_attention_config"
    raw = mapping(name, raw)
    known = {"chunk_size", "local_size", "original_max_position_embeddings"}
    # which keys a query skips to save time, not what exact attention computes
    known |= {"sparse_attention_enabled", "sparse_attention_config", "sparse_attention_threshold"}
    if unknown := sorted(set(raw) - known):
        raise InputError(f"{name} has the unknown key {shown(unknown[0])}; known: {', '.join(sorted(known))}.")
    chunk = DualChunk(
        chunk_size=whole(f"{name} chunk_size", raw.get("chunk_size", 8192)),
        local_size=whole(f"{name} local_size", raw.get("local_size", 1024)),
        original_length=whole(f"{name} original_max_position_embeddings",
                              raw.get("original_max_position_embeddings", 0), least=0),
    )  # fmt: skip
    if not chunk.local_size < chunk.chunk_size:
        raise InputError(f"{name} needs 0 < local_size < chunk_size, got {chunk.local_size} and {chunk.chunk_size}.")
    return chunk


def _sparse_from_hf(raw: Any) -> SparsePrefill | None:
    """A list of {head: ["vertical_and_slash", vertical, slash, score]}, one mapping per layer, as MInference has it."""
    layers = (raw or {}).get("sparse_attention_config")
    if not layers or not flag("sparse_attention_enabled", raw.get("sparse_attention_enabled", True)):
        return None
    if not isinstance(layers, list):
        raise InputError(f"sparse_attention_config is {shown(layers)}; it must be a list of one mapping per layer.")
    vertical, slash = [], []
    for i, layer in enumerate(layers):
        heads: list[Any] = (
            [layer.get(str(head)) for head in range(len(layer))] if isinstance(layer, Mapping) else [None]
        )
        if not all(isinstance(h, list) and len(h) >= 3 and h[0] == "vertical_and_slash" for h in heads):
            raise InputError(
                f"sparse_attention_config of layer {i} is not a mapping of every head to "
                '["vertical_and_slash", vertical, slash, score]; no released Qwen has another pattern.'
            )
        vertical.append(tuple(whole(f"sparse_attention_config columns of layer {i}", h[1], least=0) for h in heads))
        slash.append(tuple(whole(f"sparse_attention_config diagonals of layer {i}", h[2], least=0) for h in heads))
    threshold = whole("sparse_attention_threshold", raw.get("sparse_attention_threshold", 32768), least=0)
    return SparsePrefill(tuple(vertical), tuple(slash), threshold)


def sparse_to_hf(sparse: SparsePrefill) -> list[dict[str, list[Any]]]:
    """The content of `sparse_attention_config.json`."""
    return [
        {str(head): ["vertical_and_slash", *budget, 1.0] for head, budget in enumerate(zip(*layer, strict=True))}
        for layer in zip(sparse.vertical, sparse.slash, strict=True)
    ]


def _moe_from_hf(c: Mapping[str, Any]) -> MoeConfig:
    shared = "shared_expert_intermediate_size"
    return MoeConfig(
        num_experts=whole("num_experts", c["num_experts"]),
        top_k=whole("num_experts_per_tok", c["num_experts_per_tok"]),
        expert_intermediate_size=whole("moe_intermediate_size", c["moe_intermediate_size"]),
        shared_intermediate_size=whole(shared, c[shared], least=0) if c["model_type"] == "qwen2_moe" else 0,
        norm_topk_prob=flag("norm_topk_prob", c.get("norm_topk_prob", False)),
        aux_loss_coef=number("router_aux_loss_coef", c.get("router_aux_loss_coef", 0.001), least=0.0),
    )


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """See `ModelConfig.to_hf`."""
    out: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[c.model_type]],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
        "initializer_range": c.initializer_range,
    }
    out |= _qwen1_to_hf(c) if c.model_type == "qwen" else _later_to_hf(c)
    if from_hf(out) != c:
        changed = next(f.name for f in dataclasses.fields(c) if getattr(from_hf(out), f.name) != getattr(c, f.name))
        raise InputError(
            f"config.json of model_type {c.model_type!r} has no words for {changed}={shown(getattr(c, changed))}, "
            "which no released code of that architecture has; save the model without it."
        )
    return out


def _qwen1_to_hf(c: ModelConfig) -> dict[str, Any]:
    ntk = c.rope_scaling if isinstance(c.rope_scaling, DynamicNtkScaling) else None
    trained = ntk.trained_length if ntk else c.logn_trained_length or c.max_position_embeddings
    windows = {"layer_windows": list(c.windows)} if c.windows else {}
    return windows | {
        "intermediate_size": 2 * c.intermediate_size,
        "kv_channels": c.head_dim,
        "layer_norm_epsilon": c.rms_norm_eps,
        "rotary_emb_base": c.rope_theta,
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "seq_length": trained,
        "use_dynamic_ntk": ntk is not None,
        "use_logn_attn": c.logn_trained_length is not None,
    }


def _later_to_hf(c: ModelConfig) -> dict[str, Any]:
    out = {
        "hidden_act": "silu",
        "intermediate_size": c.intermediate_size,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "attention_dropout": 0.0,
    } | _windows_to_hf(c)
    if c.qk_norm:
        out["attention_bias"] = False
    if c.qk_norm or c.head_dim != c.hidden_size // c.num_heads:
        out["head_dim"] = c.head_dim
    if isinstance(c.rope_scaling, LinearScaling):
        out["rope_scaling"] = {"rope_type": "linear", "factor": c.rope_scaling.factor}
    elif isinstance(c.rope_scaling, NtkScaling):
        out["rope_scaling"] = {"rope_type": "ntk", "factor": c.rope_scaling.factor}
    elif isinstance(c.rope_scaling, YarnScaling):
        fields = dataclasses.asdict(c.rope_scaling)
        fields["original_max_position_embeddings"] = fields.pop("original_length")
        out["rope_scaling"] = {"rope_type": "yarn"} | {k: v for k, v in fields.items() if v is not None}
    if c.dual_chunk:
        fields = dataclasses.asdict(c.dual_chunk)
        fields["original_max_position_embeddings"] = fields.pop("original_length")
        if c.sparse_prefill:
            fields["sparse_attention_config"] = sparse_to_hf(c.sparse_prefill)
            fields["sparse_attention_threshold"] = c.sparse_prefill.threshold
        out["dual_chunk_attention_config"] = fields
    if c.moe:
        out |= {
            "num_experts": c.moe.num_experts,
            "num_experts_per_tok": c.moe.top_k,
            "moe_intermediate_size": c.moe.expert_intermediate_size,
            "norm_topk_prob": c.moe.norm_topk_prob,
            "router_aux_loss_coef": c.moe.aux_loss_coef,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        if c.model_type == "qwen2_moe":
            out["shared_expert_intermediate_size"] = c.moe.shared_intermediate_size
    return out


def _windows_to_hf(c: ModelConfig) -> dict[str, Any]:
    sizes = sorted({window for window in c.windows if window})
    everywhere = c.model_type != "qwen3_moe" or None not in c.windows
    if len(sizes) > 1 or not everywhere:
        return {"layer_windows": list(c.windows)}
    out: dict[str, Any] = {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        # for readers that know no layer_types: all from this layer on
        "max_window_layers": c.windows.index(sizes[0]) if sizes else c.num_layers,
    }
    if sizes:
        out["layer_types"] = ["sliding_attention" if window else "full_attention" for window in c.windows]
    return out
