"""Qwen (first generation) in PyTorch, written from the formulas: what ours is checked against.

`transformers` has no Qwen1, and the released remote code no longer runs with it. The names of parameters are those of
the released checkpoints. Clarity before speed: one thing after the other, no kernels, no fused paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Past(NamedTuple):
    """What a prefill leaves behind: rotated keys and values of each layer, and every row's NTK alpha."""

    layers: list[tuple[Tensor, Tensor]]
    alphas: Tensor


class Output(NamedTuple):
    logits: Tensor
    cache: Past


def ntk_alpha(length: int, trained_length: int) -> float:
    """alpha = max(2^ceil(log2(T / trained) + 1) - 1, 1)."""
    return max(2 ** math.ceil(math.log2(length / trained_length) + 1) - 1, 1)


class RMSNorm(nn.Module):
    """The weight multiplies what was already cast back to x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, T, H, h], angles [B, T, h/2]: dimension i turns with dimension i + h/2, in float32."""
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-head attention; the rows of c_attn are all of Q, then all of K, then all of V."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.num_heads, self.head_dim = config["num_attention_heads"], config["kv_channels"]
        self.seq_length, self.use_logn = config["seq_length"], config["use_logn_attn"]
        self.c_attn = nn.Linear(hidden, 3 * self.num_heads * self.head_dim)
        self.c_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=False)

    def forward(
        self, x: Tensor, angles: Tensor, is_token: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """is_token [B, S] marks the keys that are not padding."""
        batch, num_queries, _ = x.shape
        q, k, v = (y.view(batch, num_queries, self.num_heads, self.head_dim) for y in self.c_attn(x).chunk(3, dim=-1))
        q, k = rotate(q, angles), rotate(k, angles)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        num_keys = k.shape[1]
        query_positions = torch.arange(num_keys - num_queries, num_keys)
        if self.use_logn and not self.training and num_keys > self.seq_length:
            ordinals = (query_positions + 1).float()
            scale = torch.where(ordinals > self.seq_length, ordinals.log() / math.log(self.seq_length), 1.0)
            q = q * scale[None, :, None, None].type_as(q)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(self.head_dim)
        seen = (torch.arange(num_keys)[None] <= query_positions[:, None]) & is_token[:, None, None, :]
        probs = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        out = torch.einsum("bhts,bshd->bthd", probs, v)
        return self.c_proj(out.flatten(2)), (k, v)


class MLP(nn.Module):
    """w2 is the gate and w1 the value; each has half the configured width."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["intermediate_size"] // 2
        self.w1 = nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.c_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * functional.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config["hidden_size"], config["layer_norm_epsilon"])
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config["hidden_size"], config["layer_norm_epsilon"])
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, angles: Tensor, is_token: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.attn(self.ln_1(x), angles, is_token, past)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), present


class Transformer(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.h = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.ln_f = RMSNorm(config["hidden_size"], config["layer_norm_epsilon"])

    def alphas(self, lengths: Tensor) -> Tensor:
        """NTK alpha of each row, from its true length at prefill; 1 in training."""
        if self.training or not self.config["use_dynamic_ntk"]:
            return torch.ones(len(lengths))
        return torch.tensor([ntk_alpha(n, self.config["seq_length"]) for n in lengths.tolist()], dtype=torch.float32)

    def forward(self, input_ids: Tensor, is_token: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        alphas = past.alphas if past else self.alphas(is_token.sum(-1))
        head_dim = self.config["kv_channels"]
        base = self.config["rotary_emb_base"] * alphas ** (head_dim / (head_dim - 2))  # [B]
        frequencies = 1.0 / base[:, None] ** (torch.arange(0, head_dim, 2).float() / head_dim)  # [B, h/2]
        start = past.layers[0][0].shape[1] if past else 0
        positions = torch.arange(start, start + input_ids.shape[1]).float()
        angles = positions[None, :, None] * frequencies[:, None, :]  # [B, T, h/2]
        x, presents = self.wte(input_ids), []
        for i, block in enumerate(self.h):
            x, present = block(x, angles, is_token, past.layers[i] if past else None)
            presents.append(present)
        return self.ln_f(x), Past(presents, alphas)


class QWenLMHeadModel(nn.Module):
    """`config` is the mapping in a Qwen1 checkpoint's config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: None = None,
        cache: Past | None = None,
        use_cache: bool = True,
    ) -> Output:
        """input_ids [B, T]; attention_mask [B, S] with S counting the past, 0 at padding, which stands on the right.

        The arguments stand where those of `transformers`' models do; positions always count from the first token.
        """
        past_length = cache.layers[0][0].shape[1] if cache else 0
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], past_length + input_ids.shape[1])
        hidden, past = self.transformer(input_ids, attention_mask.bool(), cache)
        return Output(self.lm_head(hidden), past)
