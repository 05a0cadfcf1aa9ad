"""Dual Chunk Attention in PyTorch, dense: every pair of positions by itself, straight from the formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qwen_jax.config import DualChunk


def pair_positions(chunk: DualChunk, i: int, j: int) -> tuple[int, int]:
    """Rotary positions of a query at i and a key at j <= i; the clamp is at C, as in released code."""
    length, window = chunk.chunk_size - chunk.local_size, chunk.chunk_size
    successive = [min(length + r, window) for r in range(length)]
    apart = i // length - j // length
    if apart == 0:
        return i % length, j % length
    if apart == 1:
        return successive[i % length], j % length
    return successive[length - 1], j % length


def length_scale(chunk: DualChunk, length: int) -> float:
    if not chunk.original_length:
        return 1.0
    return max(1.0, 0.1 * math.log(length / chunk.original_length) + 1.0)


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """x [..., h] turned by `position` [...]: dimension i with dimension i + h/2."""
    half = x.shape[-1] // 2
    angles = position.double()[..., None] * theta ** -(torch.arange(half).double() / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: list[int],
    segments: list[int],
    chunk: DualChunk,
    theta: float,
    prompt_length: int | None = None,
) -> Tensor:
    """q [T, H, h] and k, v [T, K, h], not yet turned, of one row, in float64; [T, H, h].

    prompt_length None is training. A token of the prompt is scaled by the prompt's length, a later one by its own.
    """
    count, groups = len(positions), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    pairs = [[pair_positions(chunk, i, j) if j <= i else (0, 0) for j in positions] for i in positions]
    query_at, key_at = torch.tensor(pairs).unbind(-1)  # [T, S]
    turned_q = rotate(q[:, None].expand(-1, count, -1, -1), query_at[..., None].expand(-1, -1, q.shape[1]), theta)
    turned_k = rotate(k[None].expand(count, -1, -1, -1), key_at[..., None].expand(-1, -1, q.shape[1]), theta)
    scores = (turned_q * turned_k).sum(-1) / math.sqrt(q.shape[-1])  # [T, S, H]
    if prompt_length is not None:
        scale = torch.tensor([length_scale(chunk, max(prompt_length, p + 1)) for p in positions]).double()
        scores = scores * scale[:, None, None] * scale[None, :, None]
    at, document = torch.tensor(positions), torch.tensor(segments)
    seen = (at[None] <= at[:, None]) & (document[None] == document[:, None])
    weights = scores.masked_fill(~seen[..., None], -math.inf).softmax(dim=1)
    return torch.einsum("tsh,shd->thd", weights, v)


def dense_model(folder: Any, chunk: DualChunk, prompt_lengths: list[int | None]) -> torch.nn.Module:
    """transformers' model of a checkpoint folder, in float64, whose every layer attends as above.

    `prompt_lengths` is read anew at every call, so that a caller may change it.
    """
    import transformers
    from transformers import AttentionInterface
    from transformers.models.qwen2 import modeling_qwen2

    config = transformers.AutoConfig.from_pretrained(folder)
    theta = config.rope_parameters["rope_theta"]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        places = list(range(query.shape[1]))
        rows = [
            dense_attention(*row, places, [0] * len(places), chunk, theta, length)
            for *row, length in zip(query, key, value, prompt_lengths, strict=True)
        ]
        return torch.stack(rows), None

    AttentionInterface.register("dense_dual_chunk", attend)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="dense_dual_chunk"
    )
    modeling_qwen2.apply_rotary_pos_emb = lambda q, k, *_: (q, k)  # the tests put the real one back
    return model.eval()
