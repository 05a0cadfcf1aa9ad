"""GPTQ (Frantar et al., arXiv 2210.17323): column by column, with what rounding lost made good by those that follow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.leaves import Grouped
from train.quantise.methods import Seen, by_rows, not_zero

BLOCK = 128  # columns between two updates of all that follow


def gptq(
    weight: jax.Array, seen: Seen, *, bits: int, group: int, act_order: bool = False, damping: float = 0.01
) -> Grouped:
    """A matrix [out, in] in symmetric codes of 4 or 8 bits, with a float16 scale for each `group` of inputs.

    Inputs are taken in the order of their energy, the largest first. With `act_order` that order makes the groups
    (`desc_act`); otherwise groups stay those of neighbours, are taken by their largest, and each in its own order
    (arXiv 2505.14638). damping: of the mean energy, added to each.
    """
    num_in = weight.shape[1]
    energy = jnp.diagonal(seen.gram)
    order = jnp.argsort(-energy) if act_order else _group_order(energy, group)
    inverse = _inverse_factor(seen.gram[order][:, order], damping)
    codes, scale = _columns(by_rows(weight[:, order]), inverse, bits, group)
    values = codes.reshape(len(weight), -1, group)
    if not act_order:  # back to neighbours
        back = jnp.argsort(order)
        groups = jnp.argsort(order[::group] // group)
        return Grouped(_narrow(codes[:, back].reshape(values.shape), bits), scale[:, groups])
    # within a group a file's inputs are in their own order
    within = jnp.argsort(order.reshape(-1, group), axis=-1)
    values = jnp.take_along_axis(values, within[None], axis=-1)
    order = jnp.take_along_axis(order.reshape(-1, group), within, axis=-1).reshape(num_in)
    return Grouped(_narrow(values, bits), scale, order=order.astype(jnp.int32))


def _narrow(codes: jax.Array, bits: int) -> jax.Array:
    return codes.astype(jnp.int4 if bits == 4 else jnp.int8)


def _group_order(energy: jax.Array, group: int) -> jax.Array:
    """Groups by their largest, and inputs within each, both descending; int [in]."""
    energy = energy.reshape(-1, group)
    within = jnp.argsort(-energy, axis=-1) + group * jnp.arange(len(energy))[:, None]
    return within[jnp.argsort(-jnp.max(energy, axis=-1))].reshape(-1)


def _inverse_factor(gram: jax.Array, damping: float) -> jax.Array:
    """Upper triangular U with Uᵀ U = (gram + damping)^-1, its equation (3). Inputs that are always 0 count as others.

    By the Cholesky factor of the matrix turned round, which needs no inverse of the whole.
    """
    energy = jnp.diagonal(gram)
    mean = jnp.mean(energy)
    gram = gram + jnp.diag(jnp.where(energy == 0, jnp.maximum(mean, 1e-30), damping * mean))
    upper = jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]  # gram = upper upperᵀ
    return lax.linalg.triangular_solve(upper, jnp.eye(len(gram)), left_side=True, lower=False)


def _columns(weight: jax.Array, inverse: jax.Array, bits: int, group: int) -> tuple[jax.Array, jax.Array]:
    """int8 codes [out, in] and float16 scales [out, groups] of consecutive columns. Its algorithm 1."""
    num_out, num_in = weight.shape
    block = int(np.lcm(BLOCK, group)) if num_in % np.lcm(BLOCK, group) == 0 else group
    most = 2 ** (bits - 1)

    def column(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part, factor, errors, codes, scales = carry

        def new_scale() -> jax.Array:
            members = lax.dynamic_slice_in_dim(part, i, group, axis=1)
            largest = jnp.max(jnp.abs(members), axis=1) / (most - 0.5)
            return lax.dynamic_update_slice_in_dim(
                scales, not_zero(largest.astype(jnp.float16))[:, None], i // group, axis=1
            )

        scales = lax.cond(i % group == 0, new_scale, lambda: scales)
        scale = lax.dynamic_index_in_dim(scales, i // group, axis=1, keepdims=False).astype(jnp.float32)
        values = lax.dynamic_index_in_dim(part, i, axis=1, keepdims=False)
        code = jnp.clip(jnp.round(values / scale), -most, most - 1)
        row = lax.dynamic_index_in_dim(factor, i, axis=0, keepdims=False)  # 0 left of the diagonal
        error = (values - code * scale) / row[i]
        # columns before this one are done: the row is 0 there
        part = part - error[:, None] * row[None]
        errors = lax.dynamic_update_slice_in_dim(errors, error[:, None], i, axis=1)
        codes = lax.dynamic_update_slice_in_dim(codes, code.astype(jnp.int8)[:, None], i, axis=1)
        return part, factor, errors, codes, scales

    def one_block(weight: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        rows = lax.dynamic_slice_in_dim(inverse, start, block, axis=0)  # [block, in]
        factor = lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        part = lax.dynamic_slice_in_dim(weight, start, block, axis=1)
        carry = (
            part, factor, jnp.zeros((num_out, block)), jnp.zeros((num_out, block), jnp.int8),
            jnp.zeros((num_out, block // group), jnp.float16),
        )  # fmt: skip
        _, _, errors, codes, scales = lax.fori_loop(0, block, column, carry)
        # all that follows; what is done is changed too, and never read again
        product = lax.dot_general(errors, rows, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
        return weight - product, (codes, scales)

    _, (codes, scales) = lax.scan(one_block, weight, jnp.arange(0, num_in, block))
    return jnp.swapaxes(codes, 0, 1).reshape(num_out, num_in), jnp.swapaxes(scales, 0, 1).reshape(num_out, -1)
