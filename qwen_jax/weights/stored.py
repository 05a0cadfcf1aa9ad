"""One tensor as it lies in a file, read by rows: nothing is loaded or decoded before it is asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.weights._files import reading
from qwen_jax.weights.dequant import BLOCK_FORMATS

if TYPE_CHECKING:
    from qwen_jax.leaves import Blocks

PLAIN_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# of what quantised weights are made of; no weight by themselves
CODE_DTYPES = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
}  # fmt: skip
_DTYPES = PLAIN_DTYPES | CODE_DTYPES
_DECODE_ELEMENTS = 1 << 18  # float32 values decoded at a time: 1 MiB stays in a core's cache


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of `shape` at byte `offset` of `path`; `encoding` is a key of the tables above or BLOCK_FORMATS.

    `strides` (elements) is given only for the non-contiguous tensors that a torch file may hold.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    encoding: str
    strides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.encoding not in _DTYPES and self.encoding not in BLOCK_FORMATS:
            raise self.unread()
        fmt = BLOCK_FORMATS.get(self.encoding)
        if fmt and (len(self.shape) < 2 or self.shape[-1] % fmt.block_size):
            raise InputError(f"{self.path} holds {self.encoding} rows of {self.shape[-1:]} values, not whole blocks.")

    def unread(self) -> InputError:
        """What to raise where a tensor of this type is no weight."""
        known = ", ".join([*PLAIN_DTYPES, *BLOCK_FORMATS])
        return InputError(f"{self.path} holds a tensor of type {self.encoding}, which is not read; known: {known}.")

    @property
    def num_bytes(self) -> int:
        """Bytes from `offset` to the end of the tensor."""
        if self.strides is not None and 0 not in self.shape:
            last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
            return (last + 1) * _DTYPES[self.encoding].itemsize
        return self._bytes_of(math.prod(self.shape))

    def _bytes_of(self, elements: int) -> int:
        if self.encoding in _DTYPES:
            return elements * _DTYPES[self.encoding].itemsize
        fmt = BLOCK_FORMATS[self.encoding]
        return elements // fmt.block_size * fmt.block_bytes

    def _map(self, offset: int, num_bytes: int) -> np.ndarray:
        # A map of its own for every read: its pages leave this process's memory together with the array
        try:
            with reading(self.path):
                return np.memmap(self.path, np.uint8, "r", self.offset + offset, (num_bytes,))
        except ValueError:
            raise InputError(f"{self.path} has become shorter since it was opened; download it again.") from None

    def array(self) -> np.ndarray:
        """All of a tensor that is not in blocks, as a view of the file."""
        if not self.shape:
            return self._map(0, self.num_bytes).view(_DTYPES[self.encoding])[0]
        return next(self.rows(0, self.shape[0]))[2]

    def coded(self, start: int, stop: int) -> Blocks | None:
        """Rows of a tensor in blocks as a weight whose bytes are a view of the file; None for a tensor that is not."""
        from qwen_jax.leaves import Blocks

        fmt = BLOCK_FORMATS.get(self.encoding)
        if fmt is None:
            return None
        row_bytes = self._bytes_of(math.prod(self.shape[1:]))
        raw = self._map(start * row_bytes, (stop - start) * row_bytes)
        return Blocks(raw.reshape(stop - start, -1, fmt.block_bytes), self.encoding)

    def rows(self, start: int, stop: int, multiple_of: int = 1) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (a, b, values of rows a to b), which together cover rows start to stop along the first axis.

        Values are views of the file for plain types and float32 for block types. A view that was yielded is
        overwritten by the next. Every a - start is divisible by `multiple_of`.
        """
        if self.strides is not None:
            flat = self._map(0, self.num_bytes).view(_DTYPES[self.encoding])
            strides = [s * flat.itemsize for s in self.strides]
            yield start, stop, np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)[start:stop]
            return
        row_bytes = self._bytes_of(math.prod(self.shape[1:]))
        raw = self._map(start * row_bytes, (stop - start) * row_bytes)
        if self.encoding in _DTYPES:
            yield start, stop, raw.view(_DTYPES[self.encoding]).reshape(stop - start, *self.shape[1:])
            return
        fmt = BLOCK_FORMATS[self.encoding]
        elements = math.prod(self.shape[1:])
        step = max(_DECODE_ELEMENTS // (elements * multiple_of), 1) * multiple_of
        blocks = raw.reshape(-1, fmt.block_bytes)
        per_row = elements // fmt.block_size
        buffer = np.empty((min(step, stop - start) * per_row, fmt.block_size), np.float32)
        for a in range(start, stop, step):
            b = min(a + step, stop)
            decoded = buffer[: (b - a) * per_row]
            with np.errstate(all="ignore"):  # a NaN or infinity in a file is a value like others
                fmt.decode(blocks[(a - start) * per_row : (b - start) * per_row], decoded)
            yield a, b, decoded.reshape(b - a, *self.shape[1:])
