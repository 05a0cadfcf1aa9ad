"""What weights share whose inputs are coded group by group: products that never hold the whole of one widened."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.errors import InputError
from qwen_jax.kernels.row_blocks import block_size, row_blocks
from qwen_jax.leaves.weight import Component, Weight
from qwen_jax.sharding import current_mesh

STRIP = 1 << 22  # numbers that are widened at a time where there is no mesh: 16 MiB in float32


class Groupwise(Weight, kw_only=True):
    """An array [*out, *in] in codes of groups along its flattened input. No gradient goes to it, but through it.

    A kind has `decoded`, and arrays that begin with the axes [*out, groups], so that a mesh which splits the input
    splits whole groups or nothing.
    """

    order: Component = None
    """int32 [in]: which input lies at each place of the groups; None: they lie as they are."""
    inner: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    """The input's axes but the first."""
    float_dtype: jnp.dtype = flax.struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))
    """Of the array that this stands for."""

    @property
    def group_shape(self) -> tuple[int, ...]:
        """[*out, groups, group]: the numbers that are coded, with the input in `order`."""
        raise NotImplementedError

    def decoded(self) -> jax.Array:
        """The numbers, float32 of `group_shape`."""
        raise NotImplementedError

    def code_axes(self, groups: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        """Logical names of the axes of each array but `order`, given those of [*out, groups]."""
        raise NotImplementedError

    def of_matrix(self, out_shape: tuple[int, ...], in_shape: tuple[int, ...]) -> Any:
        """A matrix [out, in] with its axes split."""
        codes = jax.tree.map(lambda array: array.reshape(*out_shape, *array.shape[1:]), self.replace(order=None))
        return codes.replace(order=self.order, inner=in_shape[1:])

    @property
    def num_in(self) -> int:
        """Length of the flattened input."""
        return math.prod(self.group_shape[-2:])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.group_shape[:-2], self.num_in // math.prod(self.inner), *self.inner)

    @property
    def dtype(self) -> jnp.dtype:
        return self.float_dtype

    def astype(self, dtype: DTypeLike) -> Any:
        return self.replace(float_dtype=jnp.dtype(dtype))

    def dense(self) -> jax.Array:
        decoded = self.decoded()
        decoded = decoded.reshape(*decoded.shape[:-2], -1)
        if self.order is not None:
            places = jnp.argsort(self.order, axis=-1).reshape(
                *self.order.shape[:-1], *[1] * (decoded.ndim - self.order.ndim), -1
            )
            decoded = jnp.take_along_axis(decoded, places, axis=-1)
        return decoded.reshape(self.shape).astype(self.dtype)

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        codes = self.code_axes(axes[: len(axes) - len(self.inner)])
        return codes if self.order is None else [(*axes[: self.order.ndim - 1], None), *codes]

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        return _product(self, x.reshape(*x.shape[: x.ndim - num_in], -1), dtype)

    def lookup(self, ids: jax.Array) -> jax.Array:
        rows = jax.tree.map(lambda codes: jnp.take(codes, ids, 0, mode="fill", fill_value=0), self.replace(order=None))
        return rows.replace(order=None if self.order is None else self.order[None]).dense()

    def grouped_matmul(self, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
        if not rows.shape[1] == self.num_in == (self.num_in if self.order is None else self.order.shape[-1]):
            raise InputError(
                "the inputs of quantised experts are split over `tensor` across their groups, or lie in an order of "
                "their own (desc_act); use a smaller `tensor`, or widen them (dequantise)."
            )
        return _grouped_product(self, rows, group_sizes, dtype)

    # --- what a kind may have something better for --------------------------------------------------------------------

    def product(self, x: jax.Array) -> jax.Array:
        """float32 [*batch, *out] of x [*batch, in], which is in the order of the groups."""
        rows = x.reshape(-1, x.shape[-1])
        if (strips := self._strips()) is None:
            weight = self.decoded().astype(x.dtype)
            weight = weight.reshape(*weight.shape[:-2], -1)
            return _dot(x, weight, [x.ndim - 1], [weight.ndim - 1])

        def strip(_: None, weight: Groupwise) -> tuple[None, jax.Array]:
            return None, _dot(rows, weight.decoded().astype(x.dtype).reshape(-1, x.shape[-1]), [1], [1])

        y = lax.scan(strip, None, strips)[1]  # [strips, N, out of one]
        return jnp.swapaxes(y, 0, 1).reshape(*x.shape[:-1], *self.group_shape[:-2])

    def transposed_product(self, dy: jax.Array) -> jax.Array:
        """float32 [*batch, in], in the order of the groups, of dy [*batch, *out]: the product's gradient."""
        num_out = len(self.group_shape) - 2
        if (strips := self._strips()) is None:
            weight = self.decoded().astype(dy.dtype)
            weight = weight.reshape(*weight.shape[:-2], -1)
            return _dot(dy, weight, range(dy.ndim - num_out, dy.ndim), range(num_out))
        batch = dy.shape[: dy.ndim - num_out]
        rows = dy.reshape(math.prod(batch), jax.tree.leaves(strips)[0].shape[0], -1)

        def strip(sums: jax.Array, part: tuple[Groupwise, jax.Array]) -> tuple[jax.Array, None]:
            weight, dy = part
            return sums + _dot(dy, weight.decoded().astype(dy.dtype).reshape(dy.shape[1], -1), [1], [0]), None

        zeros = jnp.zeros((len(rows), self.num_in))
        return lax.scan(strip, zeros, (strips, jnp.swapaxes(rows, 0, 1)))[0].reshape(*batch, self.num_in)

    def _strips(self) -> Any:
        """This with an axis of strips of whole rows in front, or None where it is multiplied at once."""
        num_out = math.prod(self.group_shape[:-2])
        most = STRIP // self.num_in
        rows = next((n for n in range(min(most, num_out), most // 8, -1) if num_out % n == 0), num_out)
        if current_mesh() is not None or rows == num_out:
            return None  # axes stay apart: they may be split over different axes of a mesh
        front = len(self.group_shape) - 2
        return jax.tree.map(lambda codes: codes.reshape(-1, rows, *codes.shape[front:]), self.replace(order=None))


def _dot(x: jax.Array, weight: jax.Array, x_axes: Sequence[int], weight_axes: Sequence[int]) -> jax.Array:
    return lax.dot_general(
        x, weight, ((tuple(x_axes), tuple(weight_axes)), ((), ())), preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(weight: Groupwise, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[*batch, *out] in `dtype` of x [*batch, in]. The backward pass keeps the codes, not the widened weight."""
    if weight.order is not None:
        x = jnp.take(x, weight.order, axis=-1)
    return weight.product(x).astype(dtype)


def _forward(weight: Groupwise, x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, Any]:
    return _product(weight, x, dtype), (weight, jnp.empty((0,), x.dtype))


def _backward(dtype: DTypeLike, residuals: Any, dy: jax.Array) -> tuple[None, jax.Array]:
    weight, like_x = residuals
    dx = weight.transposed_product(dy.astype(like_x.dtype))
    if weight.order is not None:
        dx = jnp.take(dx, jnp.argsort(weight.order), axis=-1)
    return None, dx.astype(like_x.dtype)


_product.defvjp(_forward, _backward)


# --- experts: one after another, each for blocks of its own rows ------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_product(weight: Groupwise, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
    def product(expert: Groupwise, x: jax.Array) -> jax.Array:
        return _product(expert, x, jnp.float32)

    return _by_blocks(product, weight, rows, group_sizes, weight.group_shape[1]).astype(dtype)


def _grouped_forward(
    weight: Groupwise, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, Any]:
    return _grouped_product(weight, rows, group_sizes, dtype), (weight, jnp.empty((0,), rows.dtype), group_sizes)


def _grouped_backward(dtype: DTypeLike, residuals: Any, dy: jax.Array) -> tuple[None, jax.Array, None]:
    weight, like_rows, group_sizes = residuals

    def product(expert: Groupwise, dy: jax.Array) -> jax.Array:
        return _backward(jnp.float32, (expert, like_rows), dy)[1].astype(jnp.float32)

    return None, _by_blocks(product, weight, dy, group_sizes, weight.num_in).astype(like_rows.dtype), None


_grouped_product.defvjp(_grouped_forward, _grouped_backward)


def _by_blocks(product: Any, weight: Groupwise, rows: jax.Array, group_sizes: jax.Array, features: int) -> jax.Array:
    """float32 [N, features] of product(expert, rows of it), block by block; rows beyond the groups are 0."""
    size = block_size(len(rows), len(group_sizes), 4, 64)
    blocks = row_blocks(len(rows), group_sizes, size)
    padded = jnp.pad(rows, ((0, size), (0, 0)))

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jax.tree.map(lambda codes: lax.dynamic_index_in_dim(codes, blocks.group[i], keepdims=False), weight)
        y = product(expert, lax.dynamic_slice_in_dim(padded, blocks.start[i], size))
        return lax.dynamic_update_slice_in_dim(out, y, blocks.start[i], 0)  # what is too much, later blocks overwrite

    out = lax.fori_loop(0, blocks.number, block, jnp.zeros((len(padded), features)))[: len(rows)]
    return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), out, 0.0)
