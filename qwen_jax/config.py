"""ModelConfig: the one description of an architecture; `hf_config` says how Hugging Face spells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qwen_jax.checked import mapping, read_json, shown
from qwen_jax.errors import InputError

ModelType = Literal["qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]
MODEL_TYPES: tuple[ModelType, ...] = ("qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


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
    windows: tuple[int | None, ...] = ()
    """keys that each layer sees, the query's own included; None is all of them, and () all in every layer"""
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
        if all(window is None for window in self.windows):
            object.__setattr__(self, "windows", ())  # one way to say it, so that equal models are equal
        elif len(self.windows) != self.num_layers or any(w is not None and w < 1 for w in self.windows):
            raise InputError(
                f"the layers' windows are {shown(list(self.windows))}; each of the {self.num_layers} layers needs one "
                "size of at least 1, or null for full attention."
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
        """`windows` with one entry for each layer, always."""
        return self.windows or (None,) * self.num_layers

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
        """Reads a `config.json` mapping as `transformers` does. Raises InputError on anything it does not know."""
        from qwen_jax.hf_config import from_hf

        return from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` mapping that `from_hf` and `transformers` (or Qwen1's remote code) read as this model.

        Raises InputError when `config.json` has no words for it.
        """
        from qwen_jax.hf_config import to_hf

        return to_hf(self)


def load_config(path: str | Path) -> ModelConfig:
    """ModelConfig from a `config.json` file, or from the folder that holds one.

    Raises InputError when it is missing, is not JSON, or says what is not known.
    """
    from qwen_jax.hf_config import with_sparse_file

    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path} does not exist; a model folder needs a config.json.")
    config = read_json(path)
    try:
        return ModelConfig.from_hf(with_sparse_file(mapping("its content", config), path.parent))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
