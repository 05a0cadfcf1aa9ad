"""What a step must compute and read, by formula: the model's own FLOPs, and the bytes of weights and cache."""

from __future__ import annotations

from qwen_jax.config import ModelConfig


def matmul_params(config: ModelConfig) -> int:
    """Parameters that one token is multiplied by: the active ones, without the rows that are only looked up."""
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return config.num_active_params() - lookup


def head_params(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _last_layer_params(config: ModelConfig) -> int:
    """Parameters of a layer that a token passes through besides the projections to keys and values."""
    layers = config.num_active_params() - config.vocab_size * config.hidden_size * (2 - config.tie_word_embeddings)
    return layers // config.num_layers - 2 * config.hidden_size * config.num_kv_heads * config.head_dim


def attention_flops(config: ModelConfig, queries: int, first: int = 0) -> float:
    """FLOPs of one sequence's causal attention, forward, for `queries` tokens from position `first`: 4 h per key."""
    total = 0.0
    for window in config.layer_windows():
        limit = window or first + queries
        ramp = max(0, min(queries, limit - first))  # queries that see all keys before them
        keys = ramp * first + ramp * (ramp + 1) / 2 + (queries - ramp) * limit
        total += 4 * config.num_heads * config.head_dim * keys
    return total


def forward_flops(config: ModelConfig, batch: int, sequence: int) -> float:
    """2 N per token and causal attention (Kaplan et al., arXiv 2001.08361, 2.1, attention counted per visible key)."""
    return batch * (2 * matmul_params(config) * sequence + attention_flops(config, sequence))


def model_flops(config: ModelConfig, step: str, batch: int, sequence: int) -> float:
    """FLOPs that one step needs, whatever the program computes besides: all chips together.

    train: three forward passes' worth. prefill: one, in which only keys and values of the last layer, and no logits, are
    wanted of any token but the last. decode: one token per row after `sequence` - 1 others.
    """
    if step == "train":
        return 3 * forward_flops(config, batch, sequence)
    if step == "prefill":
        skipped = 2 * (head_params(config) + _last_layer_params(config)) * (sequence - 1)
        attention = attention_flops(config, sequence - 1) / config.num_layers
        return forward_flops(config, batch, sequence) - batch * (skipped + attention)
    return batch * (2 * matmul_params(config) * sequence + attention_flops(config, sequence))


def model_flops(config: ModelConfig, step: str, batch: int, sequence: int) -> float:
    """FLOPs that one step needs, whatever the program computes besides: all chips together.

    train: three forward passes' worth. prefill: one, in which only keys and values of the last layer, and no logits, are
    wanted of any token but the last. decode: one token per row after `sequence` - 1 others.
    """
    if step == "train":
        return 3 * forward_flops(config, batch, sequence)
    if step == "prefill":
        return forward_flops(config, batch, sequence) - 2 * head_params(config) * batch * (sequence - 1)
    return batch * (2 * matmul_params(config) + attention_flops(config, 1, sequence - 1))
