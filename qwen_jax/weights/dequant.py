"""GGUF block formats to float32: one vectorised decoder per type, bit-exact with the `gguf` package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

_LOW_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, as a float32 column [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[n, bytes] to [n, 2, bytes]: the low halves, then the high halves."""
    words = np.ascontiguousarray(packed).view(np.uint64)  # eight nibbles per operation
    out = np.empty((len(words), 2, words.shape[1]), np.uint64)
    np.bitwise_and(words, _LOW_NIBBLES, out=out[:, 0])
    np.right_shift(words, np.uint64(4), out=out[:, 1])
    out[:, 1] &= _LOW_NIBBLES
    return out.view(np.uint8)


def _bits(packed: np.ndarray) -> np.ndarray:
    """[n, bytes] to [n, 8 * bytes] of 0 or 1, lowest bit first."""
    return np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")


def _q4_0(b: np.ndarray, out: np.ndarray) -> None:
    q = _nibbles(b[:, 2:]).reshape(-1, 32).view(np.int8)
    q -= 8
    np.multiply(q, _half(b, 0), out=out)


def _q4_1(b: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_nibbles(b[:, 4:]).reshape(-1, 32), _half(b, 0), out=out)
    out += _half(b, 2)


def _five_bits(packed: np.ndarray, high: np.ndarray) -> np.ndarray:
    q = _nibbles(packed).reshape(-1, 32)
    words = _bits(high).view(np.uint64)
    words <<= np.uint64(4)
    q.view(np.uint64)[...] |= words
    return q


def _q5_0(b: np.ndarray, out: np.ndarray) -> None:
    q = _five_bits(b[:, 6:], b[:, 2:6]).view(np.int8)
    q -= 16
    np.multiply(q, _half(b, 0), out=out)


def _q5_1(b: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_five_bits(b[:, 8:], b[:, 4:8]), _half(b, 0), out=out)
    out += _half(b, 2)


def _q8_0(b: np.ndarray, out: np.ndarray) -> None:
    np.multiply(np.ascontiguousarray(b[:, 2:]).view(np.int8), _half(b, 0), out=out)


def _two_bits(packed: np.ndarray) -> np.ndarray:
    """[n, 64] to [n, 2, 4, 32]: element 128a + 32j + l is bits 2j and 2j+1 of byte 32a + l."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (packed.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)


def _q2_k(b: np.ndarray, out: np.ndarray) -> None:
    scales, d, dmin = b[:, :16], _half(b, 80), _half(b, 82)
    x = out.reshape(-1, 16, 16)
    np.multiply(_two_bits(b[:, 16:80]).reshape(-1, 16, 16), (d * (scales & 15))[..., None], out=x)
    x -= (dmin * (scales >> 4))[..., None]


def _q3_k(b: np.ndarray, out: np.ndarray) -> None:
    packed, d = b[:, 96:108], _half(b, 108)
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = ((packed[:, None, 8:] >> shifts) & 3).reshape(-1, 16)
    scales = (low | (high << 4)).astype(np.int8) - np.int8(32)
    mask = (b[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)  # [n, 8, 32]
    q = _two_bits(b[:, 32:96]).reshape(-1, 16, 16).view(np.int8)
    q -= ((mask ^ 1) << 2).reshape(-1, 16, 16).view(np.int8)
    np.multiply(q, (d * scales)[..., None], out=out.reshape(-1, 16, 16))


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 6-bit pairs of Q4_K and Q5_K: [n, 12] to two [n, 8]."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    mins = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales, mins


def _scaled(b: np.ndarray, q: np.ndarray, out: np.ndarray) -> None:
    scales, mins = _scales_and_mins(b[:, 4:16])
    x = out.reshape(-1, 8, 32)
    np.multiply(q, (_half(b, 0) * scales)[..., None], out=x)
    x -= (_half(b, 2) * mins)[..., None]


def _q4_k(b: np.ndarray, out: np.ndarray) -> None:
    _scaled(b, _nibbles(b[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32), out)


def _q5_k(b: np.ndarray, out: np.ndarray) -> None:
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)  # [n, 8, 32]
    _scaled(b, _nibbles(b[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32) | (high << 4), out)


def _q6_k(b: np.ndarray, out: np.ndarray) -> None:
    low = _nibbles(b[:, :128].reshape(-1, 64)).reshape(-1, 16, 16)
    high = _two_bits(b[:, 128:192]).reshape(-1, 16, 16)
    q = (low | (high << 4)).view(np.int8)
    q -= 32
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    np.multiply(q, (_half(b, 208) * scales)[..., None], out=out.reshape(-1, 16, 16))


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """`decode(blocks [n, block_bytes] uint8, out [n, block_size] float32)` fills `out`, which must be contiguous."""

    block_size: int
    block_bytes: int
    decode: Callable[[np.ndarray, np.ndarray], None]


BLOCK_FORMATS = {
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q2_K": BlockFormat(256, 84, _q2_k),
    "Q3_K": BlockFormat(256, 110, _q3_k),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
}
