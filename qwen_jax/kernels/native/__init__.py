"""Kernels in C for products with weights of few bits and for attention of single queries, behind XLA's FFI.

They are compiled for this machine on first use (`builder`). In products activations are rounded to int8, with a scale
for every 32, as llama.cpp rounds them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.kernels.native.builder import Unavailable, build
from qwen_jax.local_path import cache_folder

# in the order of kernels.c; of GGUF's, the inputs that a block of it holds
GGUF_INPUTS = {
    "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256,
}  # fmt: skip
FORMATS = [*GGUF_INPUTS, "INT4", "INT8"]
ROWS, BLOCK = 16, 32  # of a strip; inputs of a block
_TARGETS = ("qwen_matmul", "qwen_mlp", "qwen_rows", "qwen_attention")


class Strips(NamedTuple):
    """A weight [O, K] as the kernels take it."""

    strips: jax.Array  # uint8 [O / 16, bytes]
    format: str
    group: int  # blocks of 32 inputs that share scales


class Library:
    """The compiled kernels. `prefix` tells the handlers of one library from those of another, for tests."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        try:
            self.functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"{path} cannot be loaded ({error})") from None
        self._prefix = prefix
        for name in _TARGETS:
            jax.ffi.register_ffi_target(prefix + name, jax.ffi.pycapsule(getattr(self.functions, name)), platform="cpu")
        self.functions.qwen_strip_bytes.restype = ctypes.c_int64
        self.functions.qwen_isa.restype = ctypes.c_char_p

    @property
    def isa(self) -> str:
        """Which form of the source was compiled."""
        return self.functions.qwen_isa().decode()

    # --- packing ------------------------------------------------------------------------------------------------------

    def pack_gguf(self, blocks: np.ndarray, format: str) -> np.ndarray:
        """uint8 [O, blocks, block_bytes] of a GGUF format to uint8 [O / 16, bytes]; O a multiple of 16."""
        inputs = blocks.shape[1] * GGUF_INPUTS[format]
        out = self._empty(format, len(blocks), inputs, GGUF_INPUTS[format] // BLOCK)
        blocks = np.ascontiguousarray(blocks)
        self.functions.qwen_pack_gguf(
            FORMATS.index(format), *_pointers(blocks), *_sizes(len(blocks), inputs), *_pointers(out)
        )
        return out

    def pack_groups(self, codes: np.ndarray, scale: np.ndarray, offset: np.ndarray, format: str) -> np.ndarray:
        """scale * codes - offset: codes int8 [O, K], of INT4 from 0 to 15; scale, offset float32 [O, groups]."""
        (rows, inputs), groups = codes.shape, scale.shape[1]
        out = self._empty(format, rows, inputs, inputs // groups // BLOCK)
        arrays = [np.ascontiguousarray(codes), *(np.ascontiguousarray(x, np.float32) for x in (scale, offset))]
        sizes = _sizes(rows, inputs, inputs // groups // BLOCK)
        self.functions.qwen_pack_groups(FORMATS.index(format), *_pointers(*arrays), *sizes, *_pointers(out))
        return out

    def _empty(self, format: str, rows: int, inputs: int, group: int) -> np.ndarray:
        size = self.functions.qwen_strip_bytes(FORMATS.index(format), *_sizes(inputs, group))
        return np.empty((rows // ROWS, size), np.uint8)

    # --- calls from a traced program ----------------------------------------------------------------------------------

    def matmul(self, x: jax.Array, weights: Sequence[Strips]) -> list[jax.Array]:
        """x float32 [N, K] times up to three weights [O, K]: float32 [N, O] each."""
        shapes = [jax.ShapeDtypeStruct((len(x), len(w.strips) * ROWS), jnp.float32) for w in weights]
        return self._call("qwen_matmul", shapes, x, *(w.strips for w in weights), numbers=_numbers(weights))

    def mlp(self, x: jax.Array, gate: Strips, up: Strips, down: Strips) -> jax.Array:
        """down(silu(gate(x)) * up(x)): x float32 [N, D] to [N, D']."""
        shape = jax.ShapeDtypeStruct((len(x), len(down.strips) * ROWS), jnp.float32)
        weights = (gate, up, down)
        return self._call("qwen_mlp", shape, x, *(w.strips for w in weights), numbers=_numbers(weights))

    def rows(self, ids: jax.Array, weight: Strips, inputs: int) -> jax.Array:
        """Rows ids int32 [N] of a weight [O, K] as it was packed, zeros where an id is none: float32 [N, K]."""
        shape = jax.ShapeDtypeStruct((len(ids), inputs), jnp.float32)
        return self._call("qwen_rows", shape, ids, weight.strips, numbers=_numbers([weight]))

    def attention(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        tables: jax.Array,
        begins: jax.Array,
        ends: jax.Array,
        *,
        by_row: bool,
    ) -> jax.Array:
        """softmax(q k^T / sqrt(h)) v of a query for each row: float32 [B, H, h], NaN where a row sees no key.

        k, v: pages float32 [K, P, page, h], of which tables int32 [B, M] names each row's; by_row: [B, K, S, h], each
        row a page. begins, ends: int32 [B], the places of the keys that are seen.
        """
        shape = jax.ShapeDtypeStruct(q.shape, jnp.float32)
        return self._call("qwen_attention", shape, q, k, v, tables, begins, ends, by_row=np.uint8(by_row))

    def _call(self, name: str, results: Any, *arguments: jax.Array, **attributes: Any) -> Any:
        return jax.ffi.ffi_call(self._prefix + name, results)(*arguments, **attributes)

    # ------------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises Unavailable unless a small product equals numpy's."""
        rng = np.random.default_rng(0)
        codes, x = rng.integers(0, 16, (32, 64), np.int8), rng.integers(-127, 128, (3, 64)).astype(np.float32)
        x[:, ::32] = 127  # so that x is rounded to itself
        scale, offset = rng.random((2, 32, 2), np.float32)
        weight = Strips(jnp.asarray(self.pack_groups(codes, scale, offset, "INT4")), "INT4", 1)
        dense = codes * np.repeat(scale, 32, 1) - np.repeat(offset, 32, 1)
        found = self.matmul(jnp.asarray(x), [weight])[0], self.rows(jnp.arange(32), weight, 64)
        for ours, exact in zip(found, (x @ dense.T, dense), strict=True):
            if not np.allclose(ours, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max()):
                raise Unavailable("they were compiled, but compute something else than they should")


@functools.cache
def _found() -> Library | str:
    try:
        return Library(build(cache_folder() / "native", lambda path: Library(path, "check_").check()))
    except Unavailable as error:
        return str(error)


def why_not() -> str | None:
    """Why there are no native kernels on this machine, as the middle of a sentence; None if there are."""
    return found if isinstance(found := _found(), str) else None


def library() -> Library:
    """The kernels, compiled on the first call on a machine. Raises Unavailable."""
    if isinstance(found := _found(), str):
        raise Unavailable(found)
    return found


def _numbers(weights: Sequence[Strips]) -> np.ndarray:
    return np.array([(FORMATS.index(w.format), w.group) for w in weights], np.int64).reshape(-1)


def _pointers(*arrays: np.ndarray) -> list[ctypes.c_void_p]:
    return [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]


def _sizes(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in sizes]
