"""Weights of few bits as the C kernels multiply them (kernels/native): what `infer.prepare` makes of other kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_jax.kernels import native
from qwen_jax.leaves.blocks import Blocks
from qwen_jax.leaves.encode import encode
from qwen_jax.leaves.grouped import Grouped
from qwen_jax.leaves.int8 import Int8
from qwen_jax.leaves.lora import Lora
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
    order: Component = None
    """int32 [in]: which input lies at each place of a row; None: they lie as they are."""

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
        return [(None, None), *([] if self.order is None else [(None,)])]

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        batch = x.shape[: x.ndim - num_in]
        rows = x.reshape(math.prod(batch), -1).astype(jnp.float32)
        if self.order is not None:
            rows = jnp.take(rows, self.order, axis=1)
        return native.library().matmul(rows, [self.kernel])[0].reshape(*batch, *self.out_shape).astype(dtype)

    def lookup(self, ids: jax.Array) -> jax.Array:
        inputs = math.prod(self.in_shape)
        rows = native.library().rows(ids.reshape(-1).astype(jnp.int32), self.kernel, inputs)
        if self.order is not None:
            rows = jnp.zeros_like(rows).at[:, self.order].set(rows)
        return rows.reshape(*ids.shape, *self.in_shape)


def native_mlp(gate: Leaf, up: Leaf, down: Leaf, x: jax.Array) -> jax.Array | None:
    """`leaves.swiglu_mlp` in one call, or None where these weights do not allow it; x [B, T, D]."""
    kernels = [w.kernel for w in (gate, up, down) if isinstance(w, Native) and w.order is None]
    if len(kernels) < 3 or gate.shape[0] % native.BLOCK:
        return None
    y = native.library().mlp(x.reshape(-1, x.shape[-1]).astype(jnp.float32), *kernels)
    return y.reshape(x.shape).astype(x.dtype)


def pack(weight: Leaf, num_in: int = 1) -> Leaf:
    """A weight [*out, *in] for the C kernels, or itself where they have no form for it.

    GGUF's blocks stay what they are, and so do groups of int4 and int8 and Int8. What is dense becomes Q8_0.
    """
    if isinstance(weight, Lora):
        return weight.replace(base=pack(weight.base, num_in))
    out_shape, in_shape = weight.shape[: weight.ndim - num_in], weight.shape[weight.ndim - num_in :]
    rows, inputs = math.prod(out_shape), math.prod(in_shape)
    if isinstance(weight, Native) or rows % native.ROWS or inputs % native.BLOCK:
        return weight
    library = native.library()

    def groups(codes: Any, scale: Any, offset: Any, format: str, order: Any = None) -> Native:
        scale = np.asarray(scale, np.float32).reshape(rows, -1)
        offset = np.asarray(offset, np.float32).reshape(rows, -1) * scale
        packed = library.pack_groups(np.asarray(codes, np.int8).reshape(rows, inputs), scale, offset, format)
        return Native(jnp.asarray(packed), format, inputs // scale.shape[1] // native.BLOCK, out_shape, in_shape, order)

    match weight:
        case Blocks() if weight.format in native.GGUF_INPUTS and weight.order is None:
            format, blocks = weight.format, np.asarray(weight.blocks)
            group = native.GGUF_INPUTS[format] // native.BLOCK
            packed = library.pack_gguf(blocks.reshape(rows, -1, blocks.shape[-1]), format)
            return Native(jnp.asarray(packed), format, group, out_shape, in_shape)
        case Grouped(codebook=None) if weight.values.shape[-1] % native.BLOCK == 0:
            zero = np.zeros(1) if weight.zero is None else np.asarray(weight.zero).astype(np.float32)
            zero = np.broadcast_to(zero, weight.scale.shape)
            if weight.values.dtype == jnp.int4:
                codes = np.asarray(weight.values).astype(np.int8) + np.int8(8)
                return groups(codes, weight.scale, zero + 8, "INT4", weight.order)
            if weight.values.dtype == jnp.int8:
                return groups(weight.values, weight.scale, zero, "INT8", weight.order)
        case Int8() if weight.values.dtype == jnp.int8:
            return groups(weight.values, weight.scale, np.zeros(rows), "INT8")
        case jax.Array():
            blocks = encode(np.asarray(weight.astype(jnp.float32)).reshape(rows, inputs), "Q8_0")
            packed = library.pack_gguf(blocks.reshape(rows, inputs // native.BLOCK, -1), "Q8_0")
            return Native(jnp.asarray(packed), "Q8_0", 1, out_shape, in_shape)
    return weight
