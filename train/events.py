"""TensorBoard's event files, of scalars alone. Its packages import PyTorch where that is installed, which takes 3 s.

A file is a TFRecord of the messages of tensorboard/compat/proto/event.proto and summary.proto.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected


def header() -> bytes:
    """What a file begins with."""
    return _event(_bytes(3, b"brain.Event:2"))


def restart(step: int) -> bytes:
    """An event after which those of `step` and later steps that are there have no effect any more."""
    return _event(_integer(2, step) + _bytes(7, _integer(1, 1)))


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """The event of a step's values."""
    each = (_bytes(1, name.encode()) + struct.pack("<Bf", 2 << 3 | 5, value) for name, value in values.items())
    return _event(_integer(2, step) + _bytes(5, b"".join(_bytes(1, value) for value in each)))


def _event(fields: bytes) -> bytes:
    """A record: its length, the checksum of that, the event, and its checksum."""
    event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + fields
    length = struct.pack("<Q", len(event))
    return b"".join((length, _checksum(length), event, _checksum(event)))


def _integer(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _table() -> list[int]:
    remainders = list(range(256))
    for _ in range(8):
        remainders = [value >> 1 ^ (_POLYNOMIAL if value & 1 else 0) for value in remainders]
    return remainders


_TABLE = _table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C, turned and shifted as TFRecord has it."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    value ^= 0xFFFFFFFF
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)
