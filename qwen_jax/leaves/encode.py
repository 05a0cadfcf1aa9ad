"""float32 to GGUF's block formats, by the searches of llama.cpp's `ggml-quants.c` (its `_ref` functions).

The inverse of `blocks`. Rounding to scales is float32 as there; where its compiler fuses other operations than ours,
a code on the edge between two may come out as its neighbour.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def encode(values: np.ndarray, format: str) -> np.ndarray:
    """float32 [n, K] to uint8 [n, K / block_size * block_bytes]; `format` is a key of ENCODERS, which divides K."""
    block_size, encoder = ENCODERS[format]
    blocks = encoder(np.ascontiguousarray(values, np.float32).reshape(-1, block_size))
    return np.asarray(blocks).reshape(len(values), -1)


def _halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [n] rounded to float16: its bytes [n, 2], and as float32."""
    half = values.astype(jnp.float16)
    return lax.bitcast_convert_type(half, jnp.uint8), half.astype(jnp.float32)


def _inverse(values: jax.Array) -> jax.Array:
    return jnp.where(values == 0, 0.0, 1 / jnp.where(values == 0, 1.0, values))


def _q8_0(x: jax.Array) -> jax.Array:
    scale = jnp.abs(x).max(-1) / 127
    scaled = x * _inverse(scale)[:, None]
    codes = jnp.trunc(scaled + jnp.copysign(0.5, scaled)).astype(jnp.int8)  # halves away from zero
    return jnp.concatenate([_halves(scale)[0], lax.bitcast_convert_type(codes, jnp.uint8)], axis=-1)


def _signed_codes(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Float16 bytes of each block's scale, and its codes: the value of largest magnitude becomes code 0."""
    largest = jnp.take_along_axis(x, jnp.abs(x).argmax(-1, keepdims=True), axis=-1)[:, 0]
    scale, middle = largest / -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = jnp.trunc(x * _inverse(scale)[:, None] + (middle + 0.5))
    return _halves(scale)[0], jnp.minimum(codes, 2 * middle - 1).astype(jnp.uint8)


def _nibbles(codes: jax.Array) -> jax.Array:
    """[..., 2 n] codes to n bytes: the first half of them low, the second high."""
    low, high = jnp.split(codes & 15, 2, axis=-1)
    return low | (high << 4)


def _bits(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """Codes of so many bits along an axis of 8 / bits, as the bytes that hold them, the first lowest."""
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[(None,) * (codes.ndim - 1)]
    return (jnp.moveaxis(codes, axis, -1) << shifts).sum(-1, dtype=jnp.uint8)


def _q4_0(x: jax.Array) -> jax.Array:
    scale, codes = _signed_codes(x, 4)
    return jnp.concatenate([scale, _nibbles(codes)], axis=-1)


def _q5_0(x: jax.Array) -> jax.Array:
    scale, codes = _signed_codes(x, 5)
    high = _bits((codes >> 4).reshape(-1, 4, 8), 1, axis=-1)
    return jnp.concatenate([scale, high, _nibbles(codes)], axis=-1)


def _affine(x: jax.Array, most: int, first: float, steps: int) -> tuple[jax.Array, jax.Array]:
    """Scale and minimum (which is subtracted) [..., 1] of the groups in x [..., 32], for codes from 0 to `most`.

    `make_qkx2_quants`: starting from the range, scales in steps of 0.1 codes around it, each fitted by weighted least
    squares, large values weighing more.
    """
    weight = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True)) + jnp.abs(x)

    def total(values: jax.Array) -> jax.Array:
        return (weight * values).sum(-1, keepdims=True)

    low, high = jnp.minimum(x.min(-1, keepdims=True), 0), x.max(-1, keepdims=True)
    flat = high == low
    sum_w, sum_x = total(jnp.ones_like(x)), total(x)

    def codes_of(inverse: jax.Array, low: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(inverse * (x - low)), 0, most)

    def search(step: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scale, low, error = best
        codes = codes_of((first + 0.1 * step + most) * _inverse(high - low), low)
        sum_c, sum_cc, sum_cx = total(codes), total(codes * codes), total(codes * x)
        determinant = sum_w * sum_cc - sum_c * sum_c
        fitted = (sum_w * sum_cx - sum_x * sum_c) * _inverse(determinant)
        fitted_low = (sum_cc * sum_x - sum_c * sum_cx) * _inverse(determinant)
        fitted = jnp.where(fitted_low > 0, sum_cx * _inverse(sum_cc), fitted)
        fitted_low = jnp.minimum(fitted_low, 0)
        fitted_error = total(jnp.square(fitted * codes + fitted_low - x))
        better = (determinant > 0) & (fitted_error < error)
        found = (fitted, fitted_low, fitted_error)
        return tuple(jnp.where(better, new, old) for new, old in zip(found, best, strict=True))

    scale = (high - low) / most
    error = total(jnp.square(scale * codes_of(_inverse(scale), low) + low - x))
    scale, low, _ = lax.fori_loop(0, steps + 1, search, (scale, low, error))
    return jnp.where(flat, 0, scale), -low


def _with_minima(x: jax.Array, most: int, first: float, steps: int) -> tuple[jax.Array, jax.Array]:
    """The first 16 bytes of a block of Q4_K or Q5_K, and its codes [n, 8, 32]."""
    x = x.reshape(-1, 8, 32)
    scales, minima = (found[..., 0] for found in _affine(x, most, first, steps))

    def six_bits(values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        largest = values.max(-1)
        codes = jnp.clip(jnp.round(63 * _inverse(largest)[:, None] * values), 0, 63).astype(jnp.uint8)
        stored, rounded = _halves(largest / 63)
        return stored, codes, (rounded[:, None] * codes)[..., None]

    scale_bytes, scale_codes, scale = six_bits(scales)
    minimum_bytes, minimum_codes, minimum = six_bits(minima)
    codes = jnp.clip(jnp.round((x + minimum) * _inverse(scale)), 0, most).astype(jnp.uint8)
    (s, t), (m, n) = (jnp.split(c, 2, axis=-1) for c in (scale_codes, minimum_codes))
    packed = [s | (t >> 4 << 6), m | (n >> 4 << 6), (t & 15) | (n << 4)]
    return jnp.concatenate([scale_bytes, minimum_bytes, *packed], axis=-1), codes


def _q4_k(x: jax.Array) -> jax.Array:
    head, codes = _with_minima(x, 15, -1.0, 20)
    return jnp.concatenate([head, _nibbles(codes.reshape(-1, 4, 64)).reshape(-1, 128)], axis=-1)


def _q5_k(x: jax.Array) -> jax.Array:
    head, codes = _with_minima(x, 31, -0.5, 15)
    low = _nibbles(codes.reshape(-1, 4, 64)).reshape(-1, 128)
    return jnp.concatenate([head, _bits(codes >> 4, 1, axis=1), low], axis=-1)


def _symmetric(x: jax.Array, most: int) -> jax.Array:
    """Scale [..., 1] of the groups in x [..., 16], for codes from -most to most - 1: `make_qx_quants`, weights x²."""
    largest = jnp.take_along_axis(x, jnp.abs(x).argmax(-1, keepdims=True), axis=-1)

    def search(step: jax.Array, best: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        # the largest magnitude as -most first, then as so many tenths beside it
        offset = jnp.where(step == 0, 0, jnp.where(step <= 9, step - 10, step - 9))
        codes = jnp.clip(jnp.round(-(most + 0.1 * offset) * _inverse(largest) * x), -most, most - 1)
        dot, norm = ((x * x * codes * other).sum(-1, keepdims=True) for other in (x, codes))
        # how much of the sum of squares is explained: dot² / norm
        better = (norm > 0) & ((step == 0) | (dot * dot * best[2] > best[1] * best[1] * norm))
        found = (dot * _inverse(norm), dot, norm)
        return tuple(jnp.where(better, new, old) for new, old in zip(found, best, strict=True))

    zero = jnp.zeros_like(largest)
    scale = lax.fori_loop(0, 19, search, (zero, zero, zero))[0]
    return jnp.where(jnp.abs(largest) < 1e-15, 0, scale)


def _q6_k(x: jax.Array) -> jax.Array:
    x = x.reshape(-1, 16, 16)
    scales = _symmetric(x, 32)[..., 0]
    largest = jnp.take_along_axis(scales, jnp.abs(scales).argmax(-1, keepdims=True), axis=-1)
    inverse = -128 * _inverse(jnp.where(jnp.abs(largest) < 1e-15, 0, largest))
    stored, rounded = _halves(_inverse(inverse)[:, 0])
    scale_codes = jnp.clip(jnp.round(inverse * scales), -128, 127).astype(jnp.int8)
    scale = (rounded[:, None] * scale_codes)[..., None]
    codes = (jnp.clip(jnp.round(x * _inverse(scale)), -32, 31) + 32).astype(jnp.uint8)
    halves = codes.reshape(-1, 2, 4, 32)
    low = _nibbles(halves.reshape(-1, 2, 128)).reshape(-1, 128)
    high = _bits(halves >> 4, 2, axis=2).reshape(-1, 64)
    return jnp.concatenate([low, high, lax.bitcast_convert_type(scale_codes, jnp.uint8), stored], axis=-1)


def _compiled(encoder: Callable[[jax.Array], jax.Array]) -> Callable[[np.ndarray], np.ndarray]:
    """On the CPU, where the bytes are wanted, whatever else there is."""
    program = jax.jit(encoder)

    @functools.wraps(encoder)
    def run(x: np.ndarray) -> np.ndarray:
        with jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(program(x))

    return run


# format -> numbers in a block, and float32 [n, block_size] to uint8 [n, block_bytes]
ENCODERS = {
    "Q4_0": (32, _compiled(_q4_0)),
    "Q5_0": (32, _compiled(_q5_0)),
    "Q8_0": (32, _compiled(_q8_0)),
    "Q4_K": (256, _compiled(_q4_k)),
    "Q5_K": (256, _compiled(_q5_k)),
    "Q6_K": (256, _compiled(_q6_k)),
}
