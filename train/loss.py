"""Losses over tokens. Logits [B, T, V] never exist: the output projection and the cross-entropy are one chunked loop.

Letters: B batch, T tokens of a row, D model width, V vocabulary, N tokens of one device, C tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, PartitionSpec

from qwen_jax.layers.embedding import AXES
from qwen_jax.leaves import Leaf, map_arrays, matmul, rounded
from qwen_jax.sharding import GATHERED, activation_spec, current_mesh, scatter_sum

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
    head: Leaf,
    targets: jax.Array,
    loss_mask: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
) -> LossSums:
    """Sums of -log softmax(hidden head^T)[target] + z_loss * logsumexp^2 (PaLM, section 5) where loss_mask counts.

    hidden [B, T, D] in the compute dtype; head [V, D], an array of any float dtype, cast to it, or any kind of weight;
    targets [B, T] int32; loss_mask [B, T] float32, any weights. Logits and sums are float32. The gradient of `loss` is
    computed in the same pass over the chunks (three matrix products in all, none repeated; two where nothing of the
    head is trained), the head's accumulated in float32. Under a mesh each device takes chunks of its own tokens against
    its own rows of the vocabulary, and the head's gradient crosses the mesh once.
    """
    head = rounded(head, hidden.dtype)
    return _cross_entropy(hidden, head, targets, loss_mask.astype(jnp.float32), z_loss, chunk)


def logprobs(
    hidden: jax.Array, head: Leaf, targets: jax.Array, *, temperature: float = 1.0, chunk: int = CHUNK
) -> jax.Array:
    """log softmax(hidden head^T / temperature)[target] of each token, float32 [B, T]; differentiable.

    hidden [B, T, D], head [V, D] and targets [B, T] as in `cross_entropy`, by the same loop over chunks, which the
    gradient runs a second time.
    """
    return _logprobs(hidden, rounded(head, hidden.dtype), targets, temperature, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    hidden: jax.Array, head: Leaf, targets: jax.Array, loss_mask: jax.Array, z_loss: float, chunk: int
) -> LossSums:
    return _on_mesh(hidden, (None, head), targets, loss_mask, _Settings(z_loss, chunk))[0]


def _forward(hidden: Any, head: Any, targets: Any, loss_mask: Any, z_loss: float, chunk: int) -> tuple[LossSums, Any]:
    settings = _Settings(z_loss, chunk, with_gradients=True)
    sums, gradients, _ = _on_mesh(hidden.value, _split(head), targets.value, loss_mask.value, settings)
    return sums, gradients


def _backward(_z_loss: float, _chunk: int, gradients: Any, cotangents: LossSums) -> tuple[Any, ...]:
    d_hidden, d_head = gradients
    scale = 0.0 if isinstance(cotangents.loss, SymbolicZero) else cotangents.loss
    return (d_hidden * scale).astype(d_hidden.dtype), jax.tree.map(lambda d: d * scale, d_head), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logprobs(hidden: jax.Array, head: Leaf, targets: jax.Array, temperature: float, chunk: int) -> jax.Array:
    settings = _Settings(0.0, chunk, temperature, with_logprobs=True)
    return _on_mesh(hidden, (None, head), targets, jnp.ones(targets.shape, jnp.float32), settings)[2]


def _logprobs_forward(hidden: Any, head: Any, targets: Any, temperature: float, chunk: int) -> tuple[jax.Array, Any]:
    whole = jax.tree.map(lambda primal: primal.value, head)
    residuals = (hidden.value, _split(head), targets.value)
    return _logprobs(hidden.value, whole, targets.value, temperature, chunk), residuals


def _logprobs_backward(temperature: float, chunk: int, residuals: Any, cotangents: jax.Array) -> tuple[Any, ...]:
    hidden, head, targets = residuals
    # the gradient of a sum of -logprobs with these weights, which is what cross-entropy computes
    settings = _Settings(0.0, chunk, temperature, with_gradients=True)
    _, (d_hidden, d_head), _ = _on_mesh(hidden, head, targets, -cotangents, settings)
    return d_hidden, d_head, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward, symbolic_zeros=True)


class _Settings(NamedTuple):
    z_loss: float
    chunk: int
    temperature: float = 1.0
    with_gradients: bool = False
    with_logprobs: bool = False


def _split(head: Any) -> tuple[Any, Any]:
    """The head twice, each with None for the arrays of the other: those that need a gradient, and the rest."""
    trained = jax.tree.map(lambda primal: primal.value if primal.perturbed else None, head)
    return trained, jax.tree.map(lambda primal: None if primal.perturbed else primal.value, head)


def _merge(trained: Any, rest: Any) -> Leaf:
    return jax.tree.map(lambda a, b: b if a is None else a, trained, rest, is_leaf=lambda leaf: leaf is None)


class _Lies(NamedTuple):
    """How an array of the head lies on the mesh, and its gradient is summed."""

    whole: PartitionSpec  # as it is multiplied: split along the vocabulary only
    over: tuple[str, ...]  # mesh axes whose devices each have a part of the sum
    parts: PartitionSpec  # as its gradient leaves
    scattered: tuple[tuple[int, str], ...]  # dimensions that the summing splits, over axes of `over`


class _Layout(NamedTuple):
    """How the arrays of `_on_device` lie on the mesh."""

    over_tokens: tuple[str, ...]  # mesh axes that the tokens are split over
    over_vocab: tuple[str, ...]  # mesh axes that the head's rows are split over
    scatter_hidden: bool  # whether the gradient of the hidden states shall be split over `over_vocab` along T
    trained: Any  # a _Lies for each array of the head that needs a gradient


def _on_mesh(
    hidden: jax.Array,
    head: tuple[Any, Any],
    targets: jax.Array,
    loss_mask: jax.Array,
    settings: _Settings,
) -> tuple[LossSums, Any, Any]:
    """(sums, (gradients of hidden and head) or None, log-probabilities [B, T] or None); head as `_split` gives it."""
    mesh = current_mesh()
    if mesh is None:
        return _on_device(hidden, head, targets, loss_mask, settings, None)
    whole = _merge(*head)
    tokens = activation_spec(mesh, targets.shape, "batch", "sequence")
    scattered = activation_spec(mesh, targets.shape, "batch", "residual")
    over_tokens = tuple(jax.tree.leaves(tuple(tokens)))
    over_vocab = tuple(jax.tree.leaves(activation_spec(mesh, whole.shape, *AXES)[0]))
    lies = map_arrays(functools.partial(_lies, mesh, (*over_tokens, *over_vocab)), whole, AXES)
    trained, rest = (
        jax.tree.map(lambda array, its: its if array is not None else None, part, lies, is_leaf=_is_none_or_lies)
        for part in head
    )
    layout = _Layout(over_tokens, over_vocab, scattered != tokens, trained)
    head_specs = tuple(jax.tree.map(lambda its: its.whole, part, is_leaf=_is_lies) for part in (trained, rest))
    gradients = None
    if settings.with_gradients:
        of_head = jax.tree.map(lambda its: its.parts, trained, is_leaf=_is_lies)
        gradients = (PartitionSpec(*scattered, None), of_head)
    return jax.shard_map(
        functools.partial(_on_device, settings=settings, layout=layout),
        in_specs=(PartitionSpec(*tokens, None), head_specs, tokens, tokens),
        out_specs=(PartitionSpec(), gradients, tokens if settings.with_logprobs else None),
        check_vma=False,
    )(hidden, head, targets, loss_mask)


def _lies(mesh: AbstractMesh, over: tuple[str, ...], array: jax.Array, names: Sequence[str | None]) -> _Lies:
    """over: mesh axes that tokens or vocabulary are split over."""
    whole = activation_spec(mesh, array.shape, *(None if name in GATHERED else name for name in names))
    over = tuple(axis for axis in over if axis not in jax.tree.leaves(tuple(whole)))
    parts, scattered = list(whole), []
    for dimension, split in enumerate(activation_spec(mesh, array.shape, *names)):
        axes = jax.tree.leaves(split)
        # else those devices have the same tokens, so theirs are not parts of a sum
        if split != whole[dimension] and set(axes) <= set(over):
            parts[dimension] = split
            scattered += [(dimension, axis) for axis in axes]
    return _Lies(whole, over, PartitionSpec(*parts), tuple(scattered))


def _on_device(
    hidden: jax.Array,
    head: tuple[Any, Any],
    targets: jax.Array,
    loss_mask: jax.Array,
    settings: _Settings,
    layout: _Layout | None,
) -> tuple[LossSums, Any, Any]:
    """One device's tokens against its rows of the vocabulary; without a layout, all tokens and all rows."""
    z_loss, chunk, temperature, with_gradients, with_logprobs = settings
    trained, rest = head
    num_rows, width = _merge(*head).shape
    num_tokens = targets.size
    num_chunks = -(-num_tokens // chunk)
    size = -(-num_tokens // num_chunks)
    over_vocab = layout.over_vocab if layout else ()
    first_row = lax.axis_index(over_vocab) * num_rows if over_vocab else 0

    def chunked(x: jax.Array, *rest: int) -> jax.Array:
        x = x.reshape(num_tokens, *rest)
        if padding := num_chunks * size - num_tokens:
            x = jnp.pad(x, ((0, padding), *((0, 0) for _ in rest)))
        return x.reshape(num_chunks, size, *rest)

    def step(carry: Any, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, Any]:
        sums, d_head = carry
        h, target, weight = part  # [C, D], [C], [C]
        logits, gradients_of = jax.vjp(lambda trained, h: matmul(_merge(trained, rest), h), trained, h)  # [C, V]
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
        more, d_hidden = gradients_of(d_logits if temperature == 1 else d_logits / temperature)
        return (sums, jax.tree.map(jnp.add, d_head, more)), (d_hidden, of_each)

    parts = (chunked(hidden, width), chunked(targets), chunked(loss_mask))
    d_head = jax.tree.map(jnp.zeros_like, trained) if with_gradients else None
    (sums, d_head), (d_hidden, of_each) = lax.scan(step, (jnp.zeros(4), d_head), parts)
    if layout:
        sums = lax.psum(sums, layout.over_tokens)
    if with_logprobs:
        of_each = of_each.reshape(-1)[:num_tokens].reshape(targets.shape)
    if d_hidden is None:
        return LossSums(*sums), None, of_each
    d_hidden = d_hidden.reshape(-1, width)[:num_tokens].reshape(hidden.shape)
    if layout:
        d_head = jax.tree.map(_summed, layout.trained, d_head, is_leaf=_is_lies)
        if layout.scatter_hidden:
            d_hidden = lax.psum_scatter(d_hidden, over_vocab, scatter_dimension=1, tiled=True)
        elif over_vocab:
            d_hidden = lax.psum(d_hidden, over_vocab)
    return LossSums(*sums), (d_hidden, d_head), of_each


def _summed(lies: _Lies, gradient: jax.Array) -> jax.Array:
    for dimension, axis in lies.scattered:  # one by one, as in `_sharded_lookup`
        gradient = scatter_sum(gradient, axis, dimension)
    done = [axis for _, axis in lies.scattered]
    return lax.psum(gradient, tuple(axis for axis in lies.over if axis not in done))


def _is_lies(node: Any) -> bool:
    return isinstance(node, _Lies)


def _is_none_or_lies(node: Any) -> bool:
    return node is None or _is_lies(node)
