"""FLOPs: what a step must compute by formula, whatever its program computes besides, and what a device has to offer."""

from __future__ import annotations

import jax

from qwen_jax.config import ModelConfig

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of its kind: Google's and NVIDIA's published figures.
# The first that fits counts; a "TPU v5" is a v5p.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def head_params(config: ModelConfig) -> int:
    """Parameters of the output head, or of the table that is looked up."""
    return config.vocab_size * config.hidden_size


def matmul_params(config: ModelConfig) -> int:
    """Parameters that one token is multiplied by: the active ones, without the rows that are only looked up."""
    return config.num_active_params() - (0 if config.tie_word_embeddings else head_params(config))


def attention_flops(config: ModelConfig, queries: int, first: int = 0) -> float:
    """FLOPs of one sequence's causal attention, forward, for `queries` tokens from position `first`: 4 H h per key."""
    return sum(_layer_attention_flops(config, window, queries, first) for window in config.layer_windows())


def _layer_attention_flops(config: ModelConfig, window: int | None, queries: int, first: int) -> float:
    limit = window or first + queries
    ramp = max(0, min(queries, limit - first))  # queries that see all keys before them, themselves included
    keys = ramp * first + ramp * (ramp + 1) / 2 + (queries - ramp) * limit
    return 4 * config.num_heads * config.head_dim * keys


def model_flops(config: ModelConfig, step: str, batch: int, sequence: int, *, frozen: bool = False) -> float:
    """FLOPs that one step needs on all chips together: 2 N per token (Kaplan et al., arXiv 2001.08361, 2.1), and
    attention per visible key.

    train: three forward passes' worth; with `frozen` weights, whose gradients are not made, two, but for attention.
    prefill: one, in which of any token but the last only the last layer's keys and
    values are wanted. decode: one token per row after `sequence` - 1 others.
    """
    if step == "decode":
        return batch * (2 * matmul_params(config) + attention_flops(config, 1, sequence - 1))
    forward = 2 * matmul_params(config) * sequence + attention_flops(config, sequence)
    if step == "train":
        unmade = 2 * matmul_params(config) * sequence if frozen else 0
        return batch * (3 * forward - unmade)
    unwanted = 2 * (head_params(config) + _last_layer_params(config)) * (sequence - 1)
    unwanted += _layer_attention_flops(config, config.layer_windows()[-1], sequence - 1, 0)
    return batch * (forward - unwanted)


def _last_layer_params(config: ModelConfig) -> int:
    """Parameters of a layer that a token is multiplied by, but for the projections to keys and values."""
    layers = matmul_params(config) - head_params(config)
    return layers // config.num_layers - 2 * config.hidden_size * config.num_kv_heads * config.head_dim


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device, or None where none is published or, as for a CPU, none could be reached."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def utilisation(model: ModelConfig, batch_size: int, length: int, seconds: float) -> float | None:
    """Model FLOPs utilisation (MFU) of a step on all devices: 3 forward passes of FLOPs / (seconds x devices x peak).

    A forward pass of a row of T tokens has 2 N T FLOPs for the N parameters a token is multiplied by, and
    4 H h (1 + 2 + ... + T) in each layer's attention: causal, so half of T^2, and rows count as one document each.
    Recomputation does not count. None where the peak is unknown.
    """
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    return model_flops(model, "train", batch_size, length) / (seconds * jax.device_count() * peak)
