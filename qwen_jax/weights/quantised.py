"""Matrices that several tensors of a folder make up: GPTQ, AWQ, compressed-tensors, FP8 in blocks, bitsandbytes.

Each formula is its writer's own dequantisation, read from these tools' code and checked against what they compute.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from qwen_jax.checked import printable, shown
from qwen_jax.errors import InputError
from qwen_jax.hf_quantisation import Quantisation
from qwen_jax.weights.stored import PLAIN_DTYPES, StoredTensor

if TYPE_CHECKING:
    from qwen_jax.leaves import Grouped, Int8

_DECODE_ELEMENTS = 1 << 22  # float32 values decoded at a time
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # which field of a word each of its eight columns is


@dataclasses.dataclass(frozen=True)
class QuantisedTensor:
    """A matrix of `shape` (out, in), of the float type `encoding`; `parts` are the tensors that it is made of."""

    path: Path
    name: str
    shape: tuple[int, ...]
    encoding: str
    parts: Mapping[str, StoredTensor]
    decode: Callable[[QuantisedTensor, int, int], Grouped | Int8]
    strides: None = None

    def coded(self, start: int, stop: int) -> Grouped | Int8:
        """Rows start to stop as a weight whose arrays are numpy's."""
        return self.decode(self, start, stop)

    def rows(self, start: int, stop: int, multiple_of: int = 1) -> Iterator[tuple[int, int, np.ndarray]]:
        """As `StoredTensor.rows`, float32."""
        step = max(_DECODE_ELEMENTS // (self.shape[1] * multiple_of), 1) * multiple_of
        for a in range(start, stop, step):
            b = min(a + step, stop)
            yield a, b, _widened(self.coded(a, b))


def _widened(weight: Grouped | Int8) -> np.ndarray:
    """float32 [rows, in] of a weight in numpy arrays."""
    from qwen_jax.leaves import Int8

    if isinstance(weight, Int8):
        return weight.values.astype(np.float32) * weight.scale.astype(np.float32)[:, None]
    numbers = weight.values.astype(np.float32)
    if weight.codebook is not None:
        numbers = np.asarray(weight.codebook, np.float32)[weight.values.astype(np.int8) + 8]
    if weight.zero is not None:
        numbers -= weight.zero.astype(np.float32)[..., None]
    numbers *= weight.scale.astype(np.float32)[..., None]
    numbers = numbers.reshape(len(numbers), -1)
    if weight.order is None:
        return numbers
    out = np.empty_like(numbers)
    out[:, weight.order] = numbers
    return out


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Of int32 or uint8 [..., n] the fields of `bits`, lowest first: uint8 [..., n * fields of one]."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    out = (octets[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
    return out.reshape(*octets.shape[:-1], -1)


def _centred(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields less 2^(bits - 1), as int4 where they fit, else int8."""
    centred = (fields ^ np.uint8(1 << (bits - 1))) if bits == 8 else fields - np.uint8(1 << (bits - 1))
    return centred.view(np.int8).astype(np.int8 if bits == 8 else ml_dtypes.int4)


# --- one function a format: rows start to stop of a tensor ------------------------------------------------------------


def _gptq(tensor: QuantisedTensor, start: int, stop: int, *, bits: int, zero_offset: int, symmetric: bool) -> Grouped:
    """qweight [in * b / 32, out], packed along in; qzeros [groups, out * b / 32], along out; scales [groups, out]."""
    parts = tensor.parts
    fields = _fields(parts["qweight"].array()[:, start:stop].T, bits)
    zeros = _fields(parts["qzeros"].array(), bits)[:, start:stop].T
    zeros = (zeros + np.uint8(zero_offset)) & np.uint8(2**bits - 1)
    group_of = parts["g_idx"].array() if "g_idx" in parts else None
    scale = parts["scales"].array()[:, start:stop].T
    zero = _without(tensor, _centred(zeros, bits)) if symmetric else _centred(zeros, bits)
    return _grouped(tensor, _centred(fields, bits), scale, zero, group_of)


def _without(tensor: QuantisedTensor, zero: np.ndarray) -> None:
    """Nothing, in place of zeros that are 0."""
    if zero.any():
        raise _refused(tensor.path, tensor.name, "has zeros that differ, in a checkpoint said to be symmetric")


def _awq(tensor: QuantisedTensor, start: int, stop: int, *, symmetric: bool) -> Grouped:
    """qweight [in, out / 8] and qzeros [groups, out / 8], packed along out; scales [groups, out]."""

    def columns(part: str) -> np.ndarray:
        words = tensor.parts[part].array()[:, start // 8 : -(-stop // 8)]
        fields = _fields(words, 4).reshape(*words.shape, 8)[..., AWQ_ORDER].reshape(len(words), -1)
        return fields[:, start % 8 : start % 8 + stop - start].T

    scale = tensor.parts["scales"].array()[:, start:stop].T
    zero = _centred(columns("qzeros"), 4)
    return _grouped(tensor, _centred(columns("qweight"), 4), scale, _without(tensor, zero) if symmetric else zero)


def _packed(tensor: QuantisedTensor, start: int, stop: int, *, bits: int) -> Grouped:
    """compressed-tensors: weight_packed [out, in * b / 32]; weight_zero_point [out * b / 32, groups], along out."""
    parts = tensor.parts
    fields = _fields(parts["weight_packed"].array()[start:stop], bits)[:, : tensor.shape[1]]
    zero = None
    if "weight_zero_point" in parts:
        zero = _centred(_fields(parts["weight_zero_point"].array().T, bits)[:, start:stop].T, bits)
    group_of = parts["weight_g_idx"].array() if "weight_g_idx" in parts else None
    return _grouped(tensor, _centred(fields, bits), parts["weight_scale"].array()[start:stop], zero, group_of)


def _scaled(tensor: QuantisedTensor, start: int, stop: int, *, scale: str, per_scale: int) -> Grouped | Int8:
    """weight [out, in] in 8 bits, and a scale for all, or for each channel, group or block of both axes."""
    from qwen_jax.leaves import Int8

    parts = tensor.parts
    values = np.ascontiguousarray(parts["weight"].array()[start:stop])
    scales = parts[scale].array().reshape(parts[scale].shape or (1, 1))
    scales = scales.reshape(len(scales), -1)
    rows = np.arange(start, stop) // per_scale
    if scales.shape[1] == 1 and "weight_zero_point" not in parts:
        return Int8(values, scales[rows, 0])
    zero = parts["weight_zero_point"].array().reshape(scales.shape)[rows] if "weight_zero_point" in parts else None
    group_of = parts["weight_g_idx"].array() if "weight_g_idx" in parts else None
    return _grouped(tensor, values, scales[rows], zero, group_of)


def _int8_of_bitsandbytes(tensor: QuantisedTensor, start: int, stop: int) -> Int8:
    """weight int8 [out, in] * SCB [out] / 127."""
    from qwen_jax.leaves import Int8

    scale = tensor.parts["SCB"].array()[start:stop] * np.float32(1 / 127)
    return Int8(np.ascontiguousarray(tensor.parts["weight"].array()[start:stop]), scale)


def _four_bits_of_bitsandbytes(tensor: QuantisedTensor, start: int, stop: int, *, state: Mapping[str, Any]) -> Grouped:
    """weight [in * out / 2, 1] in row-major order, high half first; absmax of each block of it, maybe coded as well."""
    parts, num_in = tensor.parts, tensor.shape[1]
    octets = parts["weight"].array().reshape(-1, num_in // 2)[start:stop]
    fields = np.stack([octets >> 4, octets & 15], axis=-1).reshape(stop - start, num_in)
    groups = num_in // state["blocksize"]
    absmax = parts["weight.absmax"].array()[start * groups : stop * groups]
    if "weight.nested_absmax" in parts:
        nested = parts["weight.nested_absmax"].array()
        block = np.arange(start * groups, stop * groups) // state["nested_blocksize"]
        absmax = parts["weight.nested_quant_map"].array()[absmax] * nested[block] + np.float32(state["nested_offset"])
    codebook = tuple(parts["weight.quant_map"].array().tolist())
    return _grouped(tensor, _centred(fields, 4), absmax.reshape(-1, groups), None, codebook=codebook)


def _grouped(
    tensor: QuantisedTensor,
    values: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    group_of: np.ndarray | None = None,
    codebook: tuple[float, ...] | None = None,
) -> Grouped:
    """Of values [rows, in], scale and zero [rows, groups] and group_of [in]; inputs are put in the order of groups."""
    from qwen_jax.leaves import Grouped

    (rows, num_groups), num_in = scale.shape, tensor.shape[1]
    in_order, order = np.arange(num_in) // (num_in // num_groups), None
    if group_of is not None and not np.array_equal(group_of, in_order):
        order = np.argsort(group_of, kind="stable").astype(np.int32)
        if not np.array_equal(group_of[order], in_order):
            raise _refused(tensor.path, tensor.name, "has groups of different sizes")
        values = values[:, order]
    values = values.reshape(rows, num_groups, -1)
    zero = None if zero is None else np.ascontiguousarray(zero)
    return Grouped(values, np.ascontiguousarray(scale), zero, codebook=codebook, order=order)


# --- from names to tensors --------------------------------------------------------------------------------------------

# Parts of a matrix by the one whose presence shows the format; those in brackets may be absent.
_GPTQ_PARTS = "qweight qzeros scales [g_idx]"
_FORMATS = {
    "gptq": {"qweight": _GPTQ_PARTS},
    "awq": {"qweight": "qweight qzeros scales"},
    "fp8": {"weight_scale_inv": "weight weight_scale_inv [input_scale]"},
    "compressed-tensors": {
        "weight_packed": "weight_packed weight_scale weight_shape [weight_zero_point] [weight_g_idx]",
        "weight_scale": "weight weight_scale [weight_zero_point] [weight_g_idx] [input_scale] [input_zero_point]",
    },
    "bitsandbytes": {
        "SCB": "weight SCB [weight_format]",
        "weight.absmax": "weight weight.absmax weight.quant_map weight.quant_state.bitsandbytes__nf4 "
        "[weight.nested_absmax] [weight.nested_quant_map]",
    },
}
# What types a part may have; scales have those of weights.
_ENCODINGS = {
    "qweight": "I32", "qzeros": "I32", "g_idx": "I32 I64", "weight_packed": "I32", "weight_shape": "I64 I32",
    "weight_zero_point": "I32 I8", "weight_g_idx": "I32 I64", "SCB": "F32", "weight.absmax": "F32 U8",
    "weight.quant_map": "F32", "weight.nested_absmax": "F32", "weight.nested_quant_map": "F32",
    "weight.quant_state.bitsandbytes__nf4": "U8", "weight": "I8 U8 F8_E4M3",
}  # fmt: skip


def assemble(path: Path, tensors: Mapping[str, StoredTensor], how: Quantisation) -> dict[str, Any]:
    """The tensors with each quantised matrix in one piece, under the name that it has where nothing is quantised.

    Raises InputError where a part is missing or of the wrong shape.
    """
    out: dict[str, Any] = dict(tensors)
    for sign, names in _FORMATS[how.method].items():
        for found in [name for name in tensors if name.endswith(f".{sign}") and name in out]:
            module = found.removesuffix(f".{sign}")
            parts = {}
            for part in names.split():
                bare = part.strip("[]")
                name = f"{module}.{bare}"
                if bare.endswith("__nf4") and name not in tensors:
                    name = name.replace("__nf4", "__fp4")
                if name in tensors:
                    parts[bare] = out.pop(name)
                    if tensors[name].encoding not in _ENCODINGS.get(bare, tensors[name].encoding).split():
                        raise _refused(path, name, f"is of type {tensors[name].encoding}")
                elif bare == part:
                    raise InputError(f"{path} lacks the tensor {printable(name)}; it is incomplete, download it again.")
            out[f"{module}.weight"] = _tensor(path, f"{module}.weight", parts, sign, how)
    return out


def _tensor(path: Path, name: str, parts: dict[str, StoredTensor], sign: str, how: Quantisation) -> QuantisedTensor:
    def has_shape(part: str, *shape: int) -> None:
        if part in parts and parts[part].shape != shape:
            raise InputError(
                f"{path}: {part} of {printable(name)} has shape {parts[part].shape}, but should have {shape}; "
                "download it again."
            )

    def whole_groups(num_in: int, number: int) -> int:
        if not number or num_in % number:
            raise _refused(path, name, f"has {num_in} inputs in {number} groups of different sizes")
        return num_in // number

    def made(shape: tuple[int, ...], encoding: str, decode: Any, **settings: Any) -> QuantisedTensor:
        if encoding not in PLAIN_DTYPES:
            raise _refused(path, name, f"has scales of type {encoding}")
        return QuantisedTensor(path, name, shape, encoding, parts, functools.partial(decode, **settings))

    per_word = 32 // how.bits
    if how.method == "gptq":
        (words, num_out), (num_groups, _) = _matrix(path, name, parts["qweight"]), _matrix(path, name, parts["scales"])
        shape = (num_out, words * per_word)
        has_shape("qzeros", num_groups, -(-num_out // per_word))
        has_shape("scales", num_groups, num_out)
        has_shape("g_idx", shape[1])
        whole_groups(shape[1], num_groups)
        return made(
            shape, parts["scales"].encoding, _gptq, bits=how.bits, zero_offset=how.zero_offset, symmetric=how.symmetric
        )
    if how.method == "awq":
        (num_in, words), (num_groups, _) = _matrix(path, name, parts["qweight"]), _matrix(path, name, parts["scales"])
        has_shape("qzeros", num_groups, words)
        has_shape("scales", num_groups, words * 8)
        whole_groups(num_in, num_groups)
        return made((words * 8, num_in), parts["scales"].encoding, _awq, symmetric=how.symmetric)
    if sign == "weight_packed":
        num_out, words = _matrix(path, name, parts["weight_packed"])
        has_shape("weight_shape", 2)
        declared = tuple(parts["weight_shape"].array().tolist())
        num_in = declared[1]
        bits = next((bits for bits in (4, 8) if words == -(-num_in * bits // 32)), 0)
        if declared[0] != num_out or not bits:
            raise _refused(path, name, f"has the shape {shown(declared)} in {words} words a row")
        num_groups = _matrix(path, name, parts["weight_scale"])[1]
        whole_groups(num_in, num_groups)
        has_shape("weight_scale", num_out, num_groups)
        has_shape("weight_zero_point", -(-num_out * bits // 32), num_groups)
        has_shape("weight_g_idx", num_in)
        return made((num_out, num_in), parts["weight_scale"].encoding, _packed, bits=bits)
    if sign in ("weight_scale", "weight_scale_inv"):
        num_out, num_in = _matrix(path, name, parts["weight"])
        shape = parts[sign].shape
        rows, columns = (*shape, 1, 1)[:2]
        per_scale = num_out if rows == 1 else 1
        if how.block and shape not in ((num_out,), (num_out, 1), (1,), (1, 1), ()):
            per_scale = how.block[0]
            whole_groups(num_in, 0 if num_in % how.block[1] else columns)
        if (
            len(shape) > 2
            or rows != -(-num_out // per_scale)
            or (how.block and columns not in (1, num_in // how.block[1]))
        ):
            raise _refused(path, name, f"has scales of shape {shape} for {(num_out, num_in)} weights")
        whole_groups(num_in, columns)
        return made((num_out, num_in), parts[sign].encoding, _scaled, scale=sign, per_scale=per_scale)
    if sign == "SCB":
        shape = _matrix(path, name, parts["weight"])
        has_shape("SCB", shape[0])
        if parts["SCB"].encoding != "F32":
            raise _refused(path, name, f"has scales of type {parts['SCB'].encoding}")
        return made(shape, "F16", _int8_of_bitsandbytes)
    return _of_quant_state(path, name, parts, has_shape, made)


def _of_quant_state(path: Path, name: str, parts: dict[str, StoredTensor], has_shape: Any, made: Any) -> Any:
    try:
        state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].array().view(np.uint8)))
        num_out, num_in = map(int, state["shape"])
        block, nested = int(state["blocksize"]), int(state.get("nested_blocksize", 1))
        encoding = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[state["dtype"]]
        state["nested_offset"] = float(state.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: the quant_state of {printable(name)} is damaged; download it again.") from None
    if min(num_out, num_in, block, nested) < 1 or num_in % block or num_in % 2:
        raise _refused(path, name, f"has blocks of {block} that cross its rows of {num_in}")
    has_shape("weight", num_out * num_in // 2, 1)
    has_shape("weight.quant_map", 16)
    blocks = num_out * num_in // block
    has_shape("weight.absmax", blocks)
    nested_parts = {"weight.nested_absmax", "weight.nested_quant_map"}
    if nested_parts & parts.keys() != (nested_parts if parts["weight.absmax"].encoding == "U8" else set()):
        raise InputError(f"{path} lacks a part of {printable(name)}'s nested scales; download it again.")
    has_shape("weight.nested_absmax", -(-blocks // nested))
    has_shape("weight.nested_quant_map", 256)
    return made((num_out, num_in), encoding, _four_bits_of_bitsandbytes, state=state)


def _matrix(path: Path, name: str, part: StoredTensor) -> tuple[int, ...]:
    if len(part.shape) != 2 or not math.prod(part.shape):
        raise _refused(path, name, f"has a part of shape {part.shape}")
    return part.shape


def _refused(path: Path, name: str, problem: str) -> InputError:
    return InputError(f"{path}: {printable(name)} {problem}, which is not read.")
