"""Dense weights as XLA:CPU multiplies them fast (kernels/cpu.py): what `infer.prepare` makes of them for serving."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.kernels import cpu
from qwen_jax.leaves.weight import Component, Weight


class Packed(Weight):
    """A weight [*out, *in] in buffers of its own: mostly one, or parts along an axis. No layers in front, no mesh."""

    parts: tuple[Component, ...]
    axis: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.parts[0].dtype

    def dense(self) -> jax.Array:
        return self.parts[0] if len(self.parts) == 1 else jnp.concatenate(self.parts, self.axis)

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        return [axes] * len(self.parts)

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        batch_shape, out_shape = x.shape[: x.ndim - num_in], self.shape[: self.ndim - num_in]
        # "A kernel is multiplied as a matrix": of more axes XLA:CPU makes a copy
        matrix = self.dense().astype(x.dtype).reshape(math.prod(out_shape), -1)
        y = cpu.matmul(matrix, x.reshape(math.prod(batch_shape), -1))
        return y.reshape(*batch_shape, *out_shape).astype(dtype)


class PackedExperts(Weight):
    """Experts [E, out, in] of 16-bit floats as the integers that XLA:CPU takes single ones of without reading all."""

    bits: Component  # uint16
    float_dtype: jnp.dtype = flax.struct.field(pytree_node=False)

    @classmethod
    def pack(cls, weight: jax.Array) -> PackedExperts:
        return cls(cpu.bits(weight), weight.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.float_dtype

    def dense(self) -> jax.Array:
        return lax.bitcast_convert_type(self.bits, self.float_dtype)

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        return [axes]

    def grouped_matmul(self, rows: jax.Array, group_sizes: jax.Array, dtype: DTypeLike) -> jax.Array:
        if rows.dtype != self.float_dtype:
            return super().grouped_matmul(rows, group_sizes, dtype)
        return cpu.grouped_matmul(rows, self.bits, group_sizes).astype(dtype)


class Half(Weight):
    """The gate (0) or the up projection (1) [F, D] of an MLP, which lie together in parts [2, f, D] that both hold."""

    parts: tuple[Component, ...]
    which: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[1] for part in self.parts), self.parts[0].shape[2])

    @property
    def dtype(self) -> jnp.dtype:
        return self.parts[0].dtype

    def dense(self) -> jax.Array:
        return jnp.concatenate([part[self.which] for part in self.parts])

    def matmul(self, x: jax.Array, num_in: int, dtype: DTypeLike) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        y = [cpu.matmul(part[self.which].astype(x.dtype), rows) for part in self.parts]
        return jnp.concatenate(y, axis=1).reshape(*x.shape[:-1], -1).astype(dtype)

    def axes(self, axes: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        return [(None, *axes)] * len(self.parts)


def pack_mlp(gate: jax.Array, up: jax.Array, down: jax.Array) -> tuple[Half, Half, Packed]:
    """The weights of an MLP, gate and up [F, D] and down [D, F], as those of narrower ones whose sum it is."""
    cuts = cpu.cuts(len(gate))
    both = tuple(jnp.stack([gate[cut], up[cut]]) for cut in cuts)
    return Half(both, 0), Half(both, 1), Packed(tuple(down[:, cut] for cut in cuts), 1)


def packed_mlp(gate: Half, down: Packed, x: jax.Array) -> jax.Array:
    """`leaves.swiglu_mlp` of what `pack_mlp` makes; x [B, T, D]."""
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.zeros(())
    for gate_up, down_part in zip(gate.parts, down.parts, strict=True):
        both = cpu.matmul(gate_up.astype(x.dtype).reshape(-1, x.shape[-1]), rows)  # [N, 2 f]
        hidden = cpu.swiglu(*jnp.split(both, 2, axis=1))
        y = y + cpu.matmul(down_part.astype(x.dtype), hidden.astype(x.dtype))
    return y.astype(x.dtype).reshape(x.shape)
