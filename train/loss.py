"""Losses over tokens. Logits [B, T, V] never exist: the output projection and the cross-entropy are one chunked loop.

Letters: B batch, T tokens of a row, D model width, V vocabulary, N tokens of one device, C tokens of a chunk.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qwen_jax.sharding import activation_spec, current_mesh, scatter_sum

# Tokens whose float32 logits a device holds at a time: 0.6 GB at Qwen's vocabulary, enough rows to fill a matrix unit.
CHUNK = 1024


class LossSums(flax.struct.PyTreeNode):
    """float32 sums over tokens, each weighted by the loss mask; divide by `tokens` for means. Sums of parts add up."""

    loss: jax.Array  # cross-entropy plus z-loss; the only field with a gradient
    cross_entropy: jax.Array  # nats
    correct: jax.Array  # tokens whose target has the highest logit
    tokens: jax.Array


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
) -> LossSums:
    """Sums of -log softmax(hidden head^T)[target] + z_loss * logsumexp^2 (PaLM, section 5) where loss_mask counts.

    hidden [B, T, D] in the compute dtype; head [V, D] of any float dtype, cast to it; targets [B, T] int32; loss_mask
    [B, T] float32, any weights. Logits and sums are float32. The gradient of `loss` is computed in the same pass over
    the chunks (three matrix products in all, none repeated), the head's accumulated in float32. Under a mesh each
    device takes chunks of its own tokens against its own rows of the vocabulary, and the head's gradient crosses the
    mesh once.
    """
    return _cross_entropy(hidden, head, targets, loss_mask.astype(jnp.float32), z_loss, chunk)


def logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, temperature: float = 1.0, chunk: int = CHUNK
) -> jax.Array:
    """log softmax(hidden head^T / temperature)[target] of each token, float32 [B, T]; differentiable.

    hidden [B, T, D], head [V, D] and targets [B, T] as in `cross_entropy`, by the same loop over chunks, which the
    gradient runs a second time.
    """
    return _logprobs(hidden, head, targets, temperature, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, loss_mask: jax.Array, z_loss: float, chunk: int
) -> LossSums:
    return _on_mesh(hidden, head, targets, loss_mask, _Settings(z_loss, chunk))[0]


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, loss_mask: jax.Array, z_loss: float, chunk: int
) -> tuple[LossSums, Any]:
    settings = _Settings(z_loss, chunk, with_gradients=True)
    sums, gradients, _ = _on_mesh(hidden, head, targets, loss_mask, settings)
    return sums, (gradients, _empty_like(head))


def _backward(_z_loss: float, _chunk: int, residuals: Any, cotangents: LossSums) -> tuple[Any, ...]:
    (d_hidden, d_head), empty_like_head = residuals
    scale = cotangents.loss
    return (d_hidden * scale).astype(d_hidden.dtype), (d_head * scale).astype(empty_like_head.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float, chunk: int) -> jax.Array:
    settings = _Settings(0.0, chunk, temperature, with_logprobs=True)
    return _on_mesh(hidden, head, targets, jnp.ones(targets.shape, jnp.float32), settings)[2]


def _logprobs_forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, Any]:
    return _logprobs(hidden, head, targets, temperature, chunk), (hidden, head, targets)


def _logprobs_backward(temperature: float, chunk: int, residuals: Any, cotangents: jax.Array) -> tuple[Any, ...]:
    hidden, head, targets = residuals
    # the gradient of a sum of -logprobs with these weights, which is what cross-entropy computes
    settings = _Settings(0.0, chunk, temperature, with_gradients=True)
    _, (d_hidden, d_head), _ = _on_mesh(hidden, head, targets, -cotangents, settings)
    return d_hidden, d_head.astype(head.dtype), None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


class _Settings(NamedTuple):
    z_loss: float
    chunk: int
    temperature: float = 1.0
    with_gradients: bool = False
    with_logprobs: bool = False


def _empty_like(head: jax.Array) -> jax.Array:
    return jnp.empty((0,), head.dtype)  # a residual must be an array, so the dtype travels as one


def _on_mesh(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, loss_mask: jax.Array, settings: _Settings
) -> tuple[LossSums, Any, Any]:
    """(sums, (gradients of hidden and head) or None, log-probabilities [B, T] or None)."""
    head = head.astype(hidden.dtype)
    mesh = current_mesh()
    if mesh is None:
        return _on_device(hidden, head, targets, loss_mask, settings, None)
    tokens = activation_spec(mesh, targets.shape, "batch", "sequence")
    scattered = activation_spec(mesh, targets.shape, "batch", "residual")
    over_tokens = tuple(jax.tree.leaves(tuple(tokens)))
    rows, width = activation_spec(mesh, head.shape, "vocab", "embed")
    if not set(jax.tree.leaves(width)) <= set(over_tokens):
        width = None  # those devices have the same tokens, so theirs are not parts of a sum
    layout = _Layout(over_tokens, rows, width, scattered != tokens)
    gradients = (PartitionSpec(*scattered, None), PartitionSpec(rows, width)) if settings.with_gradients else None
    return jax.shard_map(
        functools.partial(_on_device, settings=settings, layout=layout),
        in_specs=(PartitionSpec(*tokens, None), PartitionSpec(rows, None), tokens, tokens),
        out_specs=(PartitionSpec(), gradients, tokens if settings.with_logprobs else None),
        check_vma=False,
    )(hidden, head, targets, loss_mask)


class _Layout(NamedTuple):
    """How the arrays of `_on_device` lie on the mesh."""

    over_tokens: tuple[str, ...]  # mesh axes that the tokens are split over
    over_vocab: Any  # mesh axis or axes that the head's rows are split over, or None
    over_width: Any  # of `over_tokens`, those that the columns of the head's gradient shall be split over, or None
    scatter_hidden: bool  # whether the gradient of the hidden states shall be split over `over_vocab` along T


def _on_device(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    settings: _Settings,
    layout: _Layout | None,
) -> tuple[LossSums, Any, Any]:
    """One device's tokens against its rows of the vocabulary; without a layout, all tokens and all rows."""
    z_loss, chunk, temperature, with_gradients, with_logprobs = settings
    num_rows, width = head.shape
    num_tokens = targets.size
    num_chunks = -(-num_tokens // chunk)
    size = -(-num_tokens // num_chunks)
    over_vocab = layout.over_vocab if layout else None
    first_row = lax.axis_index(over_vocab) * num_rows if over_vocab else 0

    def chunked(x: jax.Array, *rest: int) -> jax.Array:
        x = x.reshape(num_tokens, *rest)
        if padding := num_chunks * size - num_tokens:
            x = jnp.pad(x, ((0, padding), *((0, 0) for _ in rest)))
        return x.reshape(num_chunks, size, *rest)

    def step(carry: Any, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, Any]:
        sums, d_head = carry
        h, target, weight = part  # [C, D], [C], [C]
        logits = _dot(h, head, 1, 1)  # [C, V]
        logits = logits if temperature == 1 else logits / temperature
        highest = jnp.max(logits, axis=-1)
        highest = lax.pmax(highest, over_vocab) if over_vocab else highest
        exp = jnp.exp(logits - highest[:, None])
        is_target = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == (target - first_row)[:, None]
        total, target_logit = jnp.sum(exp, axis=-1), jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        if over_vocab:
            total, target_logit = lax.psum((total, target_logit), over_vocab)
        log_sum = jnp.log(total) + highest
        nll = log_sum - target_logit
        sums += jnp.stack(
            [
                jnp.sum(weight * (nll + z_loss * jnp.square(log_sum))),
                jnp.sum(weight * nll),
                jnp.sum(weight * (target_logit >= highest)),
                jnp.sum(weight),
            ]
        )
        of_each = -nll if with_logprobs else None
        if not with_gradients:
            return (sums, None), (None, of_each)
        of_exp = weight * (1 + 2 * z_loss * log_sum) / total
        d_logits = exp * of_exp[:, None] - jnp.where(is_target, weight[:, None], 0.0)
        d_logits = (d_logits if temperature == 1 else d_logits / temperature).astype(h.dtype)
        d_hidden = _dot(d_logits, head, 1, 0).astype(h.dtype)  # [C, D]
        return (sums, d_head + _dot(d_logits, h, 0, 0)), (d_hidden, of_each)

    parts = (chunked(hidden, width), chunked(targets), chunked(loss_mask))
    d_head = jnp.zeros(head.shape, jnp.float32) if with_gradients else None
    (sums, d_head), (d_hidden, of_each) = lax.scan(step, (jnp.zeros(4), d_head), parts)
    if layout:
        sums = lax.psum(sums, layout.over_tokens)
    if with_logprobs:
        of_each = of_each.reshape(-1)[:num_tokens].reshape(targets.shape)
    if d_hidden is None:
        return LossSums(*sums), None, of_each
    d_hidden = d_hidden.reshape(-1, width)[:num_tokens].reshape(hidden.shape)
    if layout:
        rest = layout.over_tokens
        if layout.over_width:
            for axis in jax.tree.leaves(layout.over_width):  # one by one, as in `_sharded_lookup`
                d_head = scatter_sum(d_head, axis, 1)
            rest = tuple(axis for axis in rest if axis not in jax.tree.leaves(layout.over_width))
        d_head = lax.psum(d_head, rest)
        if layout.scatter_hidden:
            d_hidden = lax.psum_scatter(d_hidden, over_vocab, scatter_dimension=1, tiled=True)
        elif over_vocab:
            d_hidden = lax.psum(d_hidden, over_vocab)
    return LossSums(*sums), (d_hidden, d_head), of_each


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """float32 product of two matrices, summed over the named axis of each."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
