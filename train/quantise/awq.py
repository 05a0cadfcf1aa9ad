"""AWQ (Lin et al., arXiv 2306.00978): inputs that are large get finer steps, and the largest weights are cut.

An input is divided by s where it is made, and its weights multiplied by s, which changes nothing before rounding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.leaves import Grouped
from qwen_jax.weights.load import get_leaf
from train.quantise.methods import Seen, by_rows, not_zero, squared_outputs
from train.quantise.stages import Layer, Matrices, Stage, replaced

_STEPS = 20  # of the exponents tried
_CUTS = 20  # of the largest weight's half that is cut off, in so many steps
_MOST = 15  # codes are 0 to 15


def clipped(weight: jax.Array, seen: Seen, *, group: int) -> Grouped:
    """A matrix [out, in] in 4 bits with zero points; of each row and group the range that loses least of its output.

    The loss of a group is counted by itself (section 3.3 of the code that came with the paper: `auto_clip`).
    """
    weight = by_rows(weight)
    grams = jnp.diagonal(seen.gram.reshape(-1, group, seen.gram.shape[0] // group, group), axis1=0, axis2=2)
    grams = jnp.moveaxis(grams, -1, 0)  # [groups, group, group]
    members = weight.reshape(len(weight), -1, group)

    def loss(share: jax.Array) -> jax.Array:
        lost = _dense(*_codes(members, share)) - members
        product = jnp.einsum("ogi,gij->ogj", lost, grams, precision=lax.Precision.HIGHEST)
        return jnp.sum(product * lost, axis=-1)

    shares = 1 - 0.5 * jnp.arange(_CUTS) / _CUTS
    losses = lax.map(loss, shares)  # [cuts, out, groups]
    codes, scale, zero = _codes(members, shares[jnp.argmin(losses, axis=0)])
    return Grouped((codes - 8).astype(jnp.int4), scale, (zero - 8).astype(jnp.int4))


def _codes(members: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes [out, groups, group], float16 scales and zeros [out, groups]: of a `share` of the largest magnitude."""
    largest = (share * jnp.max(jnp.abs(members), axis=-1))[..., None]
    members = jnp.clip(members, -largest, largest)
    low, high = jnp.minimum(jnp.min(members, -1), 0), jnp.maximum(jnp.max(members, -1), 0)
    scale = not_zero(((high - low) / _MOST).astype(jnp.float16))
    step = scale.astype(jnp.float32)
    zero = jnp.clip(jnp.round(-low / step), 0, _MOST)
    return jnp.clip(jnp.round(members / step[..., None]) + zero[..., None], 0, _MOST), scale, zero


def _dense(codes: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    return (codes - zero[..., None]) * scale[..., None].astype(jnp.float32)


# --- what is folded into what makes the input -------------------------------------------------------------------------


def fold(
    matrices: Matrices, layer: Layer, stage: Stage, seen: list[Seen], *, group: int
) -> tuple[Layer, list[Seen], jax.Array | None]:
    """A layer whose matrices of a stage are multiplied, and what makes their input divided, and what they then meet.

    Given back last: by what each output of `stage.producer` is to be divided, which has few bits already.
    """
    weights = tuple(tuple(matrices.get(layer, path) for path in of_group) for of_group in stage.groups)
    if stage.norm is not None:
        scales = _search(weights, tuple(seen), group=group, repeats=1, heads=1)
        layer = replaced(layer, stage.norm, get_leaf(layer, stage.norm) / scales)
        rows = None
        for path in stage.kept:
            layer = _multiplied(matrices, layer, path, scales)
    else:
        assert stage.producer is not None
        width, heads = weights[0][0].shape[-1], matrices.leaf(stage.producer).unit[0]
        repeats = width // matrices.get(layer, stage.producer).shape[-2]
        search = functools.partial(_search, group=group, repeats=repeats, heads=heads)
        if weights[0][0].ndim == 3:  # each expert has its own
            rows = jax.lax.map(lambda each: search(((each[0],),), (each[1],)), (weights[0][0], seen[0]))
        else:
            rows = search(weights, tuple(seen))
        scales = _repeated(rows, repeats, heads)
        bias = stage.producer.replace("kernel", "bias")
        if stage.producer.endswith("/v/kernel") and "bias" in get_leaf(layer, "attention/v"):
            layer = replaced(layer, bias, get_leaf(layer, bias) / rows.reshape(get_leaf(layer, bias).shape))
    for path in (path for of_group in stage.groups for path in of_group):
        layer = _multiplied(matrices, layer, path, scales)
    return layer, [_met(each, scales) for each in seen], rows


def _multiplied(matrices: Matrices, layer: Layer, path: str, scales: jax.Array) -> Layer:
    """The layer with each input of a matrix [*experts, out, in] times `scales` [in] or [*experts, in]."""
    matrix = matrices.get(layer, path)
    scales = scales.reshape((1,) * (matrix.ndim - 1 - scales.ndim) + (*scales.shape[:-1], 1, scales.shape[-1]))
    return matrices.with_matrix(layer, path, matrix * scales)


def _met(seen: Seen, scales: jax.Array) -> Seen:
    """Inputs divided by `scales` [in] or [*experts, in]."""
    scales = scales.reshape((1,) * (seen.magnitude.ndim - scales.ndim) + scales.shape)
    return Seen(seen.gram / (scales[..., None] * scales[..., None, :]), seen.magnitude / scales)


def _repeated(rows: jax.Array, repeats: int, heads: int) -> jax.Array:
    """[*, in] of what is made [*, heads * h], each head of which is read by `repeats` query heads."""
    if repeats == 1:
        return rows
    by_head = rows.reshape(*rows.shape[:-1], heads, 1, -1)
    return jnp.broadcast_to(by_head, (*by_head.shape[:-2], repeats, by_head.shape[-1])).reshape(*rows.shape[:-1], -1)


@functools.partial(jax.jit, static_argnames=("group", "repeats", "heads"))
def _search(
    weights: tuple[tuple[jax.Array, ...], ...], seen: tuple[Seen, ...], *, group: int, repeats: int, heads: int
) -> jax.Array:
    """float32 [in / repeats]: the scales by which these matrices [*experts, out, in] lose least of their outputs.

    Tried are m^a, of the mean |x| m (the paper's equation 5), and m^a / w^(1-a), w being the mean of |weight| in parts
    of its group's largest, as AutoAWQ has it.
    """
    num_in = weights[0][0].shape[-1]
    magnitude = sum(each.magnitude.reshape(-1, num_in).sum(0) for each in seen)
    relative = []
    for matrix in (matrix for of_group in weights for matrix in of_group):
        members = jnp.abs(matrix).reshape(-1, num_in // group, group)
        relative.append((members / (jnp.max(members, -1, keepdims=True) + 1e-6)).reshape(-1, num_in))
    means = [magnitude / jnp.mean(magnitude), jnp.concatenate(relative).mean(0)]

    def made(of_input: jax.Array) -> jax.Array:
        of_input = of_input.reshape(heads, repeats, -1).mean(1).reshape(-1)
        return jnp.maximum(of_input, 1e-4)

    of_x, of_w = map(made, means)

    def scales(choice: tuple[jax.Array, jax.Array]) -> jax.Array:
        exponent, with_weights = choice
        found = of_x**exponent / jnp.where(with_weights, of_w ** (1 - exponent) + 1e-4, 1.0)
        found = jnp.maximum(found, 1e-4)
        found = found / jnp.sqrt(jnp.max(found) * jnp.min(found))
        return jnp.where(jnp.all(jnp.isfinite(found)), found, 1.0)

    def loss(choice: tuple[jax.Array, jax.Array]) -> jax.Array:
        of_input = _repeated(scales(choice), repeats, heads)

        def one(each: tuple[jax.Array, jax.Array]) -> jax.Array:
            matrix, gram = each
            matrix = by_rows(matrix)
            rounded = _dense(*_codes((matrix * of_input[None]).reshape(len(matrix), -1, group), jnp.ones(())))
            return squared_outputs(rounded.reshape(matrix.shape) / of_input[None] - matrix, gram)

        total = jnp.zeros(())
        for of_group, of_seen in zip(weights, seen, strict=True):
            for matrix in of_group:
                pair = (matrix, of_seen.gram)
                total += one(pair) if matrix.ndim == 2 else jnp.sum(lax.map(one, pair))
        return total

    exponents = jnp.tile(jnp.arange(_STEPS) / _STEPS, 2)
    choices = (exponents, jnp.arange(2 * _STEPS) >= _STEPS)
    best = jnp.argmin(lax.map(loss, choices))
    return scales((choices[0][best], choices[1][best]))
