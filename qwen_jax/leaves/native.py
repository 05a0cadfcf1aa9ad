"""Weights of few bits as the C kernels multiply them (kernels/native): what `infer.prepare` makes of other kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_jax.kernels import native
from qwen_jax.leaves.int8 import Int8
from qwen_jax.leaves.weight import Component, Leaf, Weight


class Native(Weight):
    """A weight [*out, *in] in strips of 16 rows. Products round activations to int8 by 32; no gradient goes through.

    No layers or experts in front, no mesh.
    """

    strips: Component  # uint8 [O / 16, bytes], see kernels.c
    format: str = flax.struct.field(pytree_node=False)
    group: int = flax.struct.field(pytree_node=False)
    out_shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    in_shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.out_shape, *self.in_shape)

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    @property
    def kernel(self) -> native.Strips:
        """As the kernels take it."""
        return native.Strips(self.strips, self.format, self.group)

    def dense(self) -> jax.Array:
        return self.lookup(jnp.arange(math.prod(self.out_shape))).reshape(self.shape)

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        return [(None, None)]

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        batch = x.shape[: x.ndim - num_in]
        rows = x.reshape(math.prod(batch), -1).astype(jnp.float32)
        return native.library().matmul(rows, [self.kernel])[0].reshape(*batch, *self.out_shape).astype(dtype)

    def lookup(self, ids: jax.Array) -> jax.Array:
        inputs = math.prod(self.in_shape)
        rows = native.library().rows(ids.reshape(-1).astype(jnp.int32), self.kernel, inputs)
        return rows.reshape(*ids.shape, *self.in_shape)


def native_mlp(gate: Native, up: Native, down: Native, x: jax.Array) -> jax.Array:
    """`leaves.swiglu_mlp` in one call; x [B, T, D]."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    y = native.library().mlp(rows, gate.kernel, up.kernel, down.kernel)
    return y.reshape(x.shape).astype(x.dtype)


def pack(weight: Leaf, num_in: int = 1) -> Leaf:
    """A weight [*out, *in] for the C kernels, or itself where they have no form for it.

    GGUF's blocks stay what they are, and so do groups of int4 and int8 and Int8. What is dense becomes Q8_0.
    """
    if isinstance(weight, Native):
        return weight
    out_shape, in_shape = weight.shape[: weight.ndim - num_in], weight.shape[weight.ndim - num_in :]
    rows, inputs = math.prod(out_shape), math.prod(in_shape)
    if rows % native.ROWS or inputs % native.BLOCK:
        return weight
    library = native.library()
    if isinstance(weight, Int8):
        codes = np.asarray(weight.values).reshape(rows, inputs)
        scale = np.asarray(weight.scale.astype(jnp.float32)).reshape(rows, 1)
        strips, format = library.pack_groups(codes, scale, np.zeros_like(scale), "INT8"), "INT8"
        return Native(jnp.asarray(strips), format, inputs // native.BLOCK, out_shape, in_shape)
    if isinstance(weight, Weight):
        return weight
    strips = library.pack_gguf(q8_0(np.asarray(weight.astype(jnp.float32)).reshape(rows, inputs)), "Q8_0")
    return Native(jnp.asarray(strips), "Q8_0", 1, out_shape, in_shape)


def q8_0(rows: np.ndarray) -> np.ndarray:
    """float32 [O, K] rounded to GGUF's Q8_0: blocks uint8 [O, K / 32, 34]."""
    values = rows.reshape(len(rows), -1, 32)
    scale = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(values / np.where(scale == 0, 1, scale)).astype(np.int8)
    return np.concatenate([scale.astype(np.float16).view(np.uint8), codes.view(np.uint8)], axis=-1)
