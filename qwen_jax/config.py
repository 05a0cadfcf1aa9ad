"""ModelConfig: the one description of an architecture, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qwen_jax.errors import InputError

ModelType = Literal["qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]
MODEL_TYPES: tuple[ModelType, ...] = ("qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")

# Beside config.json in a Qwen2.5-1M folder.
SPARSE_FILE = "sparse_attention_config.json"

HF_ARCHITECTURES = {
    "qwen": "QWenLMHeadModel",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071), static: `factor` times `original_length` tokens."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: positions divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class NtkScaling:
    """Static NTK: the base times `factor` ** (h / (h - 2)), which turns the slowest pair `factor` times slower."""

    factor: float


@dataclasses.dataclass(frozen=True)
class DynamicNtkScaling:
    """Qwen1's training-free scaling: the base grows with a sequence's length at prefill beyond `trained_length`."""

    trained_length: int


RopeScaling = YarnScaling | LinearScaling | NtkScaling | DynamicNtkScaling


@dataclasses.dataclass(frozen=True)
class DualChunk:
    """Dual Chunk Attention (arXiv 2402.17463) as Qwen2.5-1M declares it; `chunk_size` is the trained window."""

    chunk_size: int
    local_size: int
    original_length: int

    @property
    def chunk_length(self) -> int:
        """Tokens per chunk: up to this length DCA is exactly plain attention."""
        return self.chunk_size - self.local_size


@dataclasses.dataclass(frozen=True)
class SparsePrefill:
    """Columns and diagonals that each head [L][H] reads of prompts longer than `threshold` (MInference)."""

    vertical: tuple[tuple[int, ...], ...]
    slash: tuple[tuple[int, ...], ...]
    threshold: int = 32768


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts in every layer: `top_k` of `num_experts`, and an optional always-on shared expert."""

    num_experts: int
    top_k: int
    expert_intermediate_size: int
    shared_intermediate_size: int = 0
    norm_topk_prob: bool = False
    aux_loss_coef: float = 0.001


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One Qwen architecture. Sizes are per model, not per shard; `intermediate_size` is one branch's width F."""

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    logn_trained_length: int | None = None
    sliding_window: int | None = None
    first_window_layer: int = 0
    window_sizes: tuple[int | None, ...] | None = None
    """of every layer, instead of `sliding_window`: Qwen1's layer-wise windows"""
    dual_chunk: DualChunk | None = None
    sparse_prefill: SparsePrefill | None = None
    moe: MoeConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}; "
                "every key/value head serves the same number of query heads, so correct config.json."
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even head_dim.")
        if self.dual_chunk and self.rope_scaling:
            raise InputError(
                "config has both dual_chunk_attention_config and rope_scaling; Dual Chunk Attention scales by its own "
                "original_max_position_embeddings, so remove rope_scaling."
            )
        if self.window_sizes is not None and (
            len(self.window_sizes) != self.num_layers or any(w is not None and w < 1 for w in self.window_sizes)
        ):
            raise InputError(
                f"layer_windows is {list(self.window_sizes)}; it needs one size of at least 1, or null for full "
                f"attention, for each of the {self.num_layers} layers."
            )
        if self.sparse_prefill:
            found = [len(heads) for heads in (*self.sparse_prefill.vertical, *self.sparse_prefill.slash)]
            if found != [self.num_heads] * 2 * self.num_layers:
                raise InputError(
                    f"sparse_attention_config does not give {self.num_heads} heads of {self.num_layers} layers, which "
                    "this model has; it belongs to another model."
                )
        if self.moe and not 0 < self.moe.top_k <= self.moe.num_experts:
            raise InputError(f"num_experts_per_tok={self.moe.top_k} must be between 1 and {self.moe.num_experts}.")

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have, prompt and answer together."""
        if isinstance(self.rope_scaling, YarnScaling):
            return max(self.max_position_embeddings, int(self.rope_scaling.factor * self.rope_scaling.original_length))
        return self.max_position_embeddings

    @property
    def qkv_bias(self) -> bool:
        return self.model_type in ("qwen", "qwen2", "qwen2_moe")

    @property
    def qk_norm(self) -> bool:
        return self.model_type in ("qwen3", "qwen3_moe")

    def layer_windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer in keys, the query's own included; None is full attention."""
        if self.window_sizes is not None:
            return self.window_sizes
        if self.sliding_window is None:
            return (None,) * self.num_layers
        if self.model_type == "qwen2_moe":  # transformers alternates here instead of switching at one depth
            windowed = [i % 2 == 0 and i < self.first_window_layer for i in range(self.num_layers)]
        elif self.model_type == "qwen3_moe":  # and here it does not look at the depth
            windowed = [True] * self.num_layers
        else:
            windowed = [i >= self.first_window_layer for i in range(self.num_layers)]
        return tuple(self.sliding_window if w else None for w in windowed)

    def num_params(self) -> int:
        """Exact number of parameters (a tied embedding counts once)."""
        d, h = self.hidden_size, self.head_dim
        attention = 2 * d * self.num_heads * h + 2 * d * self.num_kv_heads * h
        if self.qkv_bias:
            attention += (self.num_heads + 2 * self.num_kv_heads) * h
        if self.qk_norm:
            attention += 2 * h
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + d + self.num_layers * (attention + 2 * d + self._ffn_params(active=False))

    def num_active_params(self) -> int:
        """Parameters that one token passes through: with experts, `top_k` of them."""
        idle = self._ffn_params(active=False) - self._ffn_params(active=True)
        return self.num_params() - self.num_layers * idle

    def _ffn_params(self, *, active: bool) -> int:
        d = self.hidden_size
        if not self.moe:
            return 3 * d * self.intermediate_size
        experts = self.moe.top_k if active else self.moe.num_experts
        shared = 3 * d * self.moe.shared_intermediate_size + (d if self.moe.shared_intermediate_size else 0)
        return d * self.moe.num_experts + experts * 3 * d * self.moe.expert_intermediate_size + shared

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads a `config.json` mapping, old spellings and new. Raises InputError on anything it does not know."""
        return _from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` mapping that `transformers` (or Qwen1's remote code) reads."""
        return _to_hf(self)


def load_config(path: str | Path) -> ModelConfig:
    """ModelConfig from a `config.json` file, or from the folder that holds one."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a model folder needs a config.json.") from None
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON ({error}); download it again.") from None
    try:
        mapping = _with_sparse_file(mapping, path.with_name(SPARSE_FILE))
        return ModelConfig.from_hf(mapping)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _with_sparse_file(mapping: Any, path: Path) -> Any:
    """The mapping with the sparse attention budgets that Qwen2.5-1M keeps in a file of their own."""
    declared = mapping.get("dual_chunk_attention_config") if isinstance(mapping, Mapping) else None
    if not declared or "sparse_attention_config" in declared or not path.exists():
        return mapping
    try:
        budgets = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON ({error}); download it again.") from None
    return {**mapping, "dual_chunk_attention_config": {**declared, "sparse_attention_config": budgets}}


# --- Hugging Face's config.json ---------------------------------------------------------------------------------------

# Keys that do not change what the network computes at inference, or that only repeat what `model_type` says.
_IGNORED = frozenset(
    """architectures auto_map attention_dropout attn_dropout_prob attn_pdrop bf16 bos_token_id chunk_size_feed_forward
    classifier_dropout dtype emb_dropout_prob embd_pdrop eos_token_id fp16 fp32 gradient_checkpointing hidden_act
    initializer_range is_decoder is_encoder_decoder kv_channels_per_head layer_types model_type no_bias onnx_safe
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type
    resid_pdrop return_dict rotary_pct scale_attn_weights softmax_in_fp32 tokenizer_class tokenizer_type torch_dtype
    transformers_version use_cache use_cache_kernel use_cache_quantization use_flash_attn attention_bias
    bias_dropout_fusion pos_emb padded_vocab_size apply_residual_connection_post_layernorm id2label label2id
    sparse_attention_config activation params_dtype seq_len router_jitter_noise n_positions n_inner qkv_bias""".split()
)

# canonical name -> spellings, first found wins
_SPELLINGS = {
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "kv_channels"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "rms_norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "seq_length": ("seq_length",),
    "use_dynamic_ntk": ("use_dynamic_ntk",),
    "use_logn_attn": ("use_logn_attn",),
    "use_sliding_window": ("use_sliding_window",),
    "sliding_window": ("sliding_window",),
    "max_window_layers": ("max_window_layers",),
    "layer_windows": ("layer_windows",),  # ours: no released code has Qwen1's windows, so no key either
    "rope_scaling": ("rope_scaling",),
    "rope_parameters": ("rope_parameters",),
    "dual_chunk_attention_config": ("dual_chunk_attention_config",),
    "num_experts": ("num_experts", "num_local_experts"),
    "top_k": ("num_experts_per_tok",),
    "expert_intermediate_size": ("moe_intermediate_size",),
    "shared_intermediate_size": ("shared_expert_intermediate_size",),
    "norm_topk_prob": ("norm_topk_prob",),
    "aux_loss_coef": ("router_aux_loss_coef",),
    "decoder_sparse_step": ("decoder_sparse_step",),
    "mlp_only_layers": ("mlp_only_layers",),
    "quantization_config": ("quantization_config",),
}
# those of them that count something
_SIZES = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
    *("max_position_embeddings", "seq_length", "num_experts", "top_k", "expert_intermediate_size"),
)
# rope_scaling type -> the other keys it may have
_ROPE_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "ntk": frozenset({"factor"}),
    "yarn": frozenset(
        """factor original_max_position_embeddings beta_fast beta_slow attention_factor mscale mscale_all_dim
        truncate""".split()
    ),
}
_KNOWN = _IGNORED.union(*map(set, _SPELLINGS.values()))


def _from_hf(config: Mapping[str, Any]) -> ModelConfig:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(f"model_type {model_type!r} is not a Qwen text model; known: {', '.join(MODEL_TYPES)}.")
    for key in config:
        if key not in _KNOWN and not key.startswith("_"):
            raise InputError(
                f"unknown config key {key!r} = {config[key]!r}; it may change the network, so it is not ignored: "
                "remove it from config.json if you know that it does not."
            )
    values: dict[str, Any] = {
        name: next((config[s] for s in spellings if s in config), None) for name, spellings in _SPELLINGS.items()
    }
    required = ["vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"]
    if missing := [_SPELLINGS[name][0] for name in required if values[name] is None]:
        raise InputError(f"config lacks {', '.join(missing)}; the file is incomplete, download it again.")
    for name in _SIZES:
        if values[name] is not None and (not isinstance(values[name], int) or values[name] < 1):
            key = next(spelling for spelling in _SPELLINGS[name] if spelling in config)
            raise InputError(
                f"{key} is {values[name]!r}; it must be a whole number of at least 1, so correct the config."
            )
    _refuse_unsupported(config, values)

    qwen1, moe_type = model_type == "qwen", model_type.endswith("_moe")
    default_heads = values["num_heads"]
    default_head_dim = 128 if model_type.startswith("qwen3") else values["hidden_size"] // values["num_heads"]
    theta, scaling = _rope_from_hf(values, default_theta=10000.0)
    logn_trained_length = None
    if qwen1:  # both are on in the released code when the file is silent
        dynamic_ntk, logn = values["use_dynamic_ntk"] is not False, values["use_logn_attn"] is not False
        if (dynamic_ntk or logn) and values["seq_length"] is None:
            raise InputError("config lacks seq_length, the trained length that use_dynamic_ntk and use_logn_attn need.")
        scaling = DynamicNtkScaling(trained_length=values["seq_length"]) if dynamic_ntk else scaling
        logn_trained_length = values["seq_length"] if logn else None
    window, first_window_layer = None, 0
    if values["use_sliding_window"]:
        window = values["sliding_window"] or 4096
        first_window_layer = 28 if values["max_window_layers"] is None else values["max_window_layers"]
    result = ModelConfig(
        model_type=model_type,
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_layers"],
        num_heads=values["num_heads"],
        num_kv_heads=values["num_kv_heads"] or default_heads,
        head_dim=values["head_dim"] or default_head_dim,
        # Qwen1 writes the width of gate and up together
        intermediate_size=values["intermediate_size"] // 2 if qwen1 else values["intermediate_size"],
        max_position_embeddings=values["max_position_embeddings"] or (8192 if qwen1 else 32768),
        rms_norm_eps=float(values["rms_norm_eps"] or 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        logn_trained_length=logn_trained_length,
        sliding_window=window,
        first_window_layer=first_window_layer,
        window_sizes=_windows_from_hf(values["layer_windows"]),
        dual_chunk=_dual_chunk_from_hf(values["dual_chunk_attention_config"]),
        sparse_prefill=_sparse_from_hf(values["dual_chunk_attention_config"]),
        moe=_moe_from_hf(values, shared=model_type == "qwen2_moe") if moe_type else None,
        initializer_range=config.get("initializer_range", 0.02),
    )
    ours = ["sliding_attention" if window else "full_attention" for window in result.layer_windows()]
    if result.window_sizes is None and config.get("layer_types") not in (None, ours):
        raise InputError(
            "layer_types does not follow from use_sliding_window and max_window_layers, and a free choice of windowed "
            "layers is not supported; no released Qwen makes one."
        )
    return result


def _refuse_unsupported(config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    if values["quantization_config"]:
        method = values["quantization_config"].get("quant_method", "unknown")
        raise InputError(
            f"the checkpoint is quantised with {method!r}, which is not read yet; use the bf16 or GGUF file."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act {config['hidden_act']!r} is not supported; every Qwen uses 'silu'.")
    if config.get("rotary_pct", 1.0) != 1.0:
        raise InputError(f"rotary_pct {config['rotary_pct']} is not supported; every Qwen rotates the whole head.")
    if (values["decoder_sparse_step"] or 1) != 1 or values["mlp_only_layers"]:
        raise InputError(
            "decoder_sparse_step != 1 or a filled mlp_only_layers mixes dense and sparse layers, which is not "
            "supported; no released Qwen does."
        )
    if config.get("qkv_bias") is False:
        raise InputError("qkv_bias=false is not supported; every Qwen with that key has biases on q, k and v.")
    if config.get("attention_bias"):
        raise InputError("attention_bias=true (a bias on o_proj too) is not supported; no released Qwen has it.")


def _rope_from_hf(values: Mapping[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    theta = values["rope_theta"]
    parameters, legacy = values["rope_parameters"], values["rope_scaling"]  # transformers 5 writes the first
    if parameters and legacy and parameters != legacy:
        raise InputError(
            "config has both rope_parameters and rope_scaling, and readers differ on which counts; keep one."
        )
    raw = parameters or legacy
    if not raw:
        return float(theta or default_theta), None
    if not isinstance(raw, Mapping):
        raise InputError(
            f"rope_scaling is {raw!r}; it must be a mapping such as {{'rope_type': 'yarn', 'factor': 4.0}}."
        )
    raw = {key: value for key, value in raw.items() if value is not None}
    theta = float(raw.pop("rope_theta", theta) or default_theta)
    kinds = [raw.pop(key) for key in ("rope_type", "type") if key in raw]
    if len(set(kinds)) > 1:
        raise InputError(f"rope_scaling says rope_type {kinds[0]!r} and type {kinds[1]!r}; keep the one that is meant.")
    kind = kinds[0] if kinds else None
    if kind not in _ROPE_KEYS:
        raise InputError(f"rope_scaling type {kind!r} is not supported; known: {', '.join(_ROPE_KEYS)}.")
    if unknown := sorted(set(raw) - _ROPE_KEYS[kind]):
        known = ", ".join(sorted(_ROPE_KEYS[kind])) or "none"
        raise InputError(f"rope_scaling of type {kind!r} has the unknown key {unknown[0]!r}; known: {known}.")
    if kind == "default":
        return theta, None
    factor = raw.pop("factor", None)
    if not isinstance(factor, int | float) or factor < 1:
        raise InputError(f"rope_scaling factor is {factor!r}; it must be a number of at least 1.")
    if kind == "linear":
        return theta, LinearScaling(float(factor))
    if kind == "ntk":
        return theta, NtkScaling(float(factor))
    if raw.pop("truncate", True) is not True:
        raise InputError("rope_scaling truncate=false is not supported; no Qwen uses it.")
    original = raw.pop("original_max_position_embeddings", None) or values["max_position_embeddings"]
    if original is None:
        raise InputError("rope_scaling lacks original_max_position_embeddings, the length that yarn multiplies.")
    options = {key: float(value) for key, value in raw.items()}
    return theta, YarnScaling(factor=float(factor), original_length=int(original), **options)


def _windows_from_hf(raw: object) -> tuple[int | None, ...] | None:
    if raw is None:
        return None
    if not isinstance(raw, list) or not all(w is None or isinstance(w, int) for w in raw):
        raise InputError(f"layer_windows is {raw!r}; it must be a list of one size, or null, per layer.")
    return tuple(raw)


def _dual_chunk_from_hf(raw: Mapping[str, Any] | None) -> DualChunk | None:
    if not raw:
        return None
    known = {"chunk_size", "local_size", "original_max_position_embeddings"}
    # which keys a query skips to save time, not what exact attention computes
    known |= {"sparse_attention_enabled", "sparse_attention_config", "sparse_attention_threshold"}
    if unknown := sorted(set(raw) - known):
        raise InputError(
            f"dual_chunk_attention_config has the unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}."
        )
    chunk = DualChunk(
        chunk_size=raw.get("chunk_size", 8192),
        local_size=raw.get("local_size", 1024),
        original_length=raw.get("original_max_position_embeddings", 0),
    )
    if not 0 < chunk.local_size < chunk.chunk_size:
        raise InputError(f"dual_chunk_attention_config needs 0 < local_size < chunk_size, got {dict(raw)}.")
    return chunk


def _sparse_from_hf(raw: Mapping[str, Any] | None) -> SparsePrefill | None:
    """A list of {head: ["vertical_and_slash", vertical, slash, score]}, one mapping per layer, as MInference has it."""
    layers = (raw or {}).get("sparse_attention_config")
    if not raw or not layers or not raw.get("sparse_attention_enabled", True):
        return None
    vertical, slash = [], []
    for i, layer in enumerate(layers):
        heads = [layer.get(str(head)) for head in range(len(layer))]
        if not all(isinstance(h, list) and len(h) >= 3 and h[0] == "vertical_and_slash" for h in heads):
            raise InputError(
                f"sparse_attention_config of layer {i} is not a mapping of every head to "
                '["vertical_and_slash", vertical, slash, score]; no released Qwen has another pattern.'
            )
        vertical.append(tuple(int(h[1]) for h in heads))
        slash.append(tuple(int(h[2]) for h in heads))
    return SparsePrefill(tuple(vertical), tuple(slash), raw.get("sparse_attention_threshold", 32768))


def sparse_to_hf(sparse: SparsePrefill) -> list[dict[str, list[Any]]]:
    """The content of `sparse_attention_config.json`."""
    return [
        {str(head): ["vertical_and_slash", *budget, 1.0] for head, budget in enumerate(zip(*layer, strict=True))}
        for layer in zip(sparse.vertical, sparse.slash, strict=True)
    ]


def _moe_from_hf(values: Mapping[str, Any], *, shared: bool) -> MoeConfig:
    needed = ["num_experts", "top_k", "expert_intermediate_size"] + ["shared_intermediate_size"] * shared
    if missing := [_SPELLINGS[name][0] for name in needed if values[name] is None]:
        raise InputError(f"config lacks {', '.join(missing)}, which this mixture of experts needs.")
    return MoeConfig(
        num_experts=values["num_experts"],
        top_k=values["top_k"],
        expert_intermediate_size=values["expert_intermediate_size"],
        shared_intermediate_size=values["shared_intermediate_size"] or 0,
        norm_topk_prob=bool(values["norm_topk_prob"]),
        aux_loss_coef=0.001 if values["aux_loss_coef"] is None else float(values["aux_loss_coef"]),
    )


def _to_hf(c: ModelConfig) -> dict[str, Any]:
    out: dict[str, Any] = {
        "architectures": [HF_ARCHITECTURES[c.model_type]],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
        "initializer_range": c.initializer_range,
    }
    if c.window_sizes is not None:
        out["layer_windows"] = list(c.window_sizes)
    if c.model_type == "qwen":
        ntk, logn = c.rope_scaling, c.logn_trained_length
        trained = ntk.trained_length if isinstance(ntk, DynamicNtkScaling) else logn or c.max_position_embeddings
        return out | {
            "intermediate_size": 2 * c.intermediate_size,
            "kv_channels": c.head_dim,
            "layer_norm_epsilon": c.rms_norm_eps,
            "rotary_emb_base": c.rope_theta,
            "rotary_pct": 1.0,
            "no_bias": True,
            "scale_attn_weights": True,
            "seq_length": trained,
            "use_dynamic_ntk": ntk is not None,
            "use_logn_attn": logn is not None,
        }
    out |= {
        "hidden_act": "silu",
        "intermediate_size": c.intermediate_size,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "use_sliding_window": c.sliding_window is not None,
        "sliding_window": c.sliding_window,
        "max_window_layers": c.first_window_layer if c.sliding_window else c.num_layers,
        "attention_dropout": 0.0,
    }
    if c.qk_norm:
        out["attention_bias"] = False
    if c.qk_norm or c.head_dim * c.num_heads != c.hidden_size:
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
