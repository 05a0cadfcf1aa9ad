"""Weights in small numbers with a scale for each group of inputs: GPTQ, AWQ, compressed-tensors, FP8, NF4."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.backend import current_backend
from qwen_jax.kernels import groups_gpu
from qwen_jax.leaves.groupwise import Groupwise
from qwen_jax.leaves.weight import Component
from qwen_jax.sharding import current_mesh

# Rows up to which the groups' partial sums are scaled; above, a widened weight costs less than so many narrow products.
# docs/quantisation.md has what the compiler makes of either.
FEW_ROWS = 256


class Grouped(Groupwise):
    """(number(values) - zero) * scale, of values [*out, groups, group], zero and scale [*out, groups].

    number(v) is v itself, or codebook[v + 8] of a 4-bit code.
    """

    values: Component  # int4, int8 or float8_e4m3fn
    scale: Component  # in the float type of its file
    zero: Component = None  # of the integers' type; None is 0
    codebook: tuple[float, ...] | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def group_shape(self) -> tuple[int, ...]:
        return self.values.shape

    def code_axes(self, groups: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        return [(*groups, None), groups, *([] if self.zero is None else [groups])]

    def decoded(self) -> jax.Array:
        numbers = self._numbers()
        if self.zero is not None:
            numbers -= self.zero[..., None].astype(jnp.float32)
        return numbers * self.scale[..., None].astype(jnp.float32)

    def _numbers(self) -> jax.Array:
        if self.codebook is None:
            return self.values.astype(jnp.float32)
        # by halves, bit after bit: XLA:TPU would gather one number at a time
        code = self.values.astype(jnp.int32) + 8
        numbers = [jnp.float32(number) for number in self.codebook]
        while len(numbers) > 1:
            upper = (code & 1) == 1
            numbers = [jnp.where(upper, b, a) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
            code >>= 1
        return numbers[0]

    def product(self, x: jax.Array) -> jax.Array:
        """Few rows, but for XLA:CPU: each group's product in the weight's own type, then its scale."""
        backend, num_rows = current_backend().kernels, math.prod(x.shape[:-1])
        if backend == "cpu" or self.codebook or num_rows > FEW_ROWS:
            return super().product(x)
        if backend == "gpu" and current_mesh() is None and groups_gpu.fits(num_rows, self.values):
            y = groups_gpu.product(x.reshape(num_rows, -1), self.values, self.scale, self.zero)
            return y.reshape(*x.shape[:-1], *self.values.shape[:-2])
        x = x.reshape(*x.shape[:-1], *self.values.shape[-2:])  # [*batch, groups, group]
        out = self.values.ndim - 2
        last, groups = ((x.ndim - 1,), (out + 1,)), ((x.ndim - 2,), (out,))
        partial = lax.dot_general(x, self.values, (last, groups), preferred_element_type=jnp.float32)

        def by_group(of_weight: jax.Array) -> jax.Array:  # [*out, groups] beside partial [groups, *batch, *out]
            of_weight = jnp.moveaxis(of_weight.astype(jnp.float32), -1, 0)
            return of_weight.reshape(len(of_weight), *[1] * (x.ndim - 2), *of_weight.shape[1:])

        y = jnp.sum(partial * by_group(self.scale), axis=0)
        if self.zero is not None:
            offset = self.zero.astype(jnp.float32) * self.scale.astype(jnp.float32)
            sums = jnp.sum(x.astype(jnp.float32), axis=-1)  # [*batch, groups]
            y -= lax.dot_general(sums, offset, (((sums.ndim - 1,), (out,)), ((), ())))
        return y
