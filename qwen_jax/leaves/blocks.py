"""Weights in GGUF's blocks, byte for byte as in the file; formulas as the gguf package has them.

Every product of a scale and a code is exact in float32, so that an addition may be fused with it and changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.leaves.groupwise import Groupwise
from qwen_jax.leaves.weight import Component

# All below take bytes [..., block_bytes] and give float32 [..., block_size], or parts of either.


def _half(b: jax.Array, at: int) -> jax.Array:
    """The float16 at byte `at` of every block, as float32 [..., 1]."""
    return lax.bitcast_convert_type(b[..., at : at + 2], jnp.float16).astype(jnp.float32)[..., None]


def _signed(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)


def _floats(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32)


def _nibbles(packed: jax.Array) -> jax.Array:
    """The low halves, then the high halves."""
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1)


def _planes(packed: jax.Array, bits: int) -> jax.Array:
    """[..., n] to [..., 8 / bits, n]: of every byte the lowest `bits`, the next, and so on."""
    return jnp.stack([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], axis=-2)


def _fifth_bits(high: jax.Array) -> jax.Array:
    """Of bytes [..., 4] the 32 bits, as 0 or 16."""
    return jnp.swapaxes(_planes(high, 1), -1, -2).reshape(*high.shape[:-1], 32) << 4


def _q4_0(b: jax.Array) -> jax.Array:
    return (_floats(_nibbles(b[..., 2:])) - 8) * _half(b, 0)


def _q4_1(b: jax.Array) -> jax.Array:
    return _floats(_nibbles(b[..., 4:])) * _half(b, 0) + _half(b, 2)


def _q5_0(b: jax.Array) -> jax.Array:
    return (_floats(_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])) - 16) * _half(b, 0)


def _q5_1(b: jax.Array) -> jax.Array:
    return _floats(_nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])) * _half(b, 0) + _half(b, 2)


def _q8_0(b: jax.Array) -> jax.Array:
    return _signed(b[..., 2:]) * _half(b, 0)


def _two_bits(packed: jax.Array) -> jax.Array:
    """[..., 64] to [..., 2, 4, 32]: element 128a + 32j + l is bits 2j and 2j+1 of byte 32a + l."""
    return _planes(packed.reshape(*packed.shape[:-1], 2, 32), 2)


def _scaled(numbers: jax.Array, scales: jax.Array) -> jax.Array:
    """[..., 256] of each block's numbers, in any shape, times its scales [..., n]."""
    return (numbers.reshape(*scales.shape, -1) * scales[..., None]).reshape(*scales.shape[:-1], 256)


def _shifted(minima: jax.Array) -> jax.Array:
    return jnp.repeat(minima, 256 // minima.shape[-1], axis=-1)


def _q2_k(b: jax.Array) -> jax.Array:
    scales, d, dmin = b[..., :16], _half(b, 80), _half(b, 82)
    values = _scaled(_floats(_two_bits(b[..., 16:80])), d * _floats(scales & 15))
    return values - _shifted(dmin * _floats(scales >> 4))


def _q3_k(b: jax.Array) -> jax.Array:
    packed = b[..., 96:108]
    high = _planes(packed[..., 8:], 2).reshape(*b.shape[:-1], 16)
    scales = _floats(_nibbles(packed[..., :8]) | (high << 4)) - 32
    mask = _planes(b[..., :32], 1)  # [..., 8, 32]
    codes = _two_bits(b[..., 32:96]).reshape(mask.shape)
    return _scaled(_floats(codes) - 4 * (1 - _floats(mask)), _half(b, 108) * scales)


def _scales_and_minima(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 6-bit pairs of Q4_K and Q5_K: [..., 12] to two [..., 8]."""
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = jnp.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=-1)
    minima = jnp.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=-1)
    return _floats(scales), _floats(minima)


def _with_minima(b: jax.Array, codes: jax.Array) -> jax.Array:
    scales, minima = _scales_and_minima(b[..., 4:16])
    return _scaled(_floats(codes), _half(b, 0) * scales) - _shifted(_half(b, 2) * minima)


def _halves(packed: jax.Array, width: int) -> jax.Array:
    """[..., n * width] to [..., n, 2 width]: nibbles of `width` bytes at a time."""
    return _nibbles(packed.reshape(*packed.shape[:-1], -1, width))


def _q4_k(b: jax.Array) -> jax.Array:
    return _with_minima(b, _halves(b[..., 16:], 32))


def _q5_k(b: jax.Array) -> jax.Array:
    high = _planes(b[..., 16:48], 1)  # [..., 8, 32]
    return _with_minima(b, _halves(b[..., 48:], 32).reshape(high.shape) | (high << 4))


def _q6_k(b: jax.Array) -> jax.Array:
    high = _two_bits(b[..., 128:192])  # [..., 2, 4, 32]
    codes = _halves(b[..., :128], 64).reshape(high.shape) | (high << 4)
    return _scaled(_floats(codes) - 32, _half(b, 208) * _signed(b[..., 192:208]))


class Format(NamedTuple):
    """A kind of block."""

    block_size: int
    """numbers"""
    block_bytes: int
    decode: Callable[[jax.Array], jax.Array]
    """bytes [..., block_bytes] to float32 [..., block_size]"""


FORMATS = {
    "Q4_0": Format(32, 18, _q4_0),
    "Q4_1": Format(32, 20, _q4_1),
    "Q5_0": Format(32, 22, _q5_0),
    "Q5_1": Format(32, 24, _q5_1),
    "Q8_0": Format(32, 34, _q8_0),
    "Q2_K": Format(256, 84, _q2_k),
    "Q3_K": Format(256, 110, _q3_k),
    "Q4_K": Format(256, 144, _q4_k),
    "Q5_K": Format(256, 176, _q5_k),
    "Q6_K": Format(256, 210, _q6_k),
}


class Blocks(Groupwise):
    """Blocks of a GGUF file, uint8 [*out, blocks, block_bytes]; `format` is a key of FORMATS."""

    blocks: Component
    format: str = flax.struct.field(pytree_node=False)

    @property
    def group_shape(self) -> tuple[int, ...]:
        return (*self.blocks.shape[:-1], FORMATS[self.format].block_size)

    def code_axes(self, groups: Sequence[str | None]) -> Sequence[Sequence[str | None]]:
        return [(*groups, None)]

    def decoded(self) -> jax.Array:
        return FORMATS[self.format].decode(self.blocks)
