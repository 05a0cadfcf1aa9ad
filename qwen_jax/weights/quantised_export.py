"""Weights out in few bits: folders of GPTQ, AWQ, compressed-tensors and FP8, laid out as these tools write them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.weights._files import new_folder
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.export import Tensor, Written, plan, write_config, write_json, write_tensors
from qwen_jax.weights.names import Leaf, leaves
from qwen_jax.weights.quantised import AWQ_ORDER

FP8_BLOCK = 128
_WORD = np.dtype(np.int32)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the matrices of a folder are coded; group: inputs that share a scale, where groups do."""

    method: Literal["gptq", "awq", "int8", "fp8"]
    bits: int = 8
    group: int = 128
    desc_act: bool = False

    def dtype(self, checkpoint: Checkpoint) -> np.dtype:
        """Of scales and of what is not quantised: GPTQ's and AWQ's kernels take float16, as Qwen's releases are."""
        if self.method in ("gptq", "awq"):
            return np.dtype(np.float16)
        stored = checkpoint.dtypes["embed/embedding"]
        return stored if stored.itemsize == 2 else np.dtype(ml_dtypes.bfloat16)

    def check(self, config: ModelConfig) -> None:
        """Raises InputError unless every matrix divides into whole groups and words."""
        for leaf in leaves(config, "hf"):
            if is_quantised(leaf):
                rows, columns = leaf.matrix_shape
                name = leaf.tensor.format(*next(leaf.indices()))
                if self.method != "int8" and columns % self.group:
                    fits = [size for size in (32, 64, 128) if columns % size == 0]
                    advice = f"--group-size {fits[-1]}" if fits and self.method != "fp8" else "int8"
                    raise InputError(
                        f"{name} has {columns} inputs, which groups of {self.group} do not divide; try {advice}."
                    )
                if self.method in ("gptq", "awq") and rows % (32 // self.bits):
                    raise InputError(
                        f"{name} has {rows} outputs, which do not fill whole words of {32 // self.bits}; try int8."
                    )


def is_quantised(leaf: Leaf) -> bool:
    """Whether a leaf is quantised: matrices of layers, but routers and gates. Embedding and head stay in 16 bits."""
    name = leaf.path.split("/")
    return name[0] == "layers" and len(leaf.unit) > leaf.row_axes and name[2] not in ("router", "shared_gate")


def save_quantised(
    checkpoint: Checkpoint,
    folder: str | Path,
    layout: Layout,
    layers: Iterable[Mapping[str, Any]],
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a folder, layer by layer as they come.

    layers: of each, by the leaf's path, matrices [*experts, out, in] as `Int8` or `Grouped`, and what else there is as
    float arrays of the leaf's shape. Embedding, head and final norm are the checkpoint's. Raises InputError when the
    folder exists or cannot be written, or a matrix does not divide.
    """
    layout.check(checkpoint.config)
    dtype = layout.dtype(checkpoint)
    dense = plan(checkpoint, dtype)
    tensors: dict[str, Written] = {}
    for name, tensor in dense.items():
        if not is_quantised(tensor.pieces[0][0]):
            tensors[name] = tensor
            continue
        module, (rows, columns) = name.removesuffix(".weight"), tensor.shape
        tensors |= {f"{module}.{part}": Written(*each) for part, each in _parts(layout, rows, columns, dtype).items()}

    by_layer = iter(enumerate(layers))
    made: dict[str, np.ndarray] = {}
    sizes = {} if max_shard_bytes is None else {"max_shard_bytes": max_shard_bytes}
    with new_folder(Path(folder)) as out:
        for name, write in write_tensors(out, tensors, **sizes):
            if name in dense and not dense[name].pieces[0][0].path.startswith("layers/"):
                for values in dense[name].blocks(checkpoint):
                    write(values)
                continue
            if name not in made:
                made |= _of_layer(*next(by_layer), dense, layout, dtype)
            values = made.pop(name)
            assert (values.shape, values.dtype) == (tensors[name].shape, tensors[name].dtype), name
            write(values)
        said = quantization_config(layout, checkpoint.config)
        write_config(checkpoint, out, dtype.name, {"quantization_config": said})
        if layout.method == "gptq":
            write_json(out / "quantize_config.json", said)


def _of_layer(
    layer: int, weights: Mapping[str, Any], dense: Mapping[str, Tensor], layout: Layout, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The tensors of one layer, by name."""
    made: dict[str, np.ndarray] = {}
    for name, tensor in dense.items():
        pieces = [piece for piece in tensor.pieces if piece[1][:1] == (layer,)]
        if not pieces or not pieces[0][0].path.startswith("layers/"):
            continue
        pieces.sort(key=lambda piece: piece[0].first_row)
        held = [jax.tree.map(lambda x, unit=unit: np.asarray(x[unit[1:]]), weights[leaf.path]) for leaf, unit in pieces]
        if is_quantised(pieces[0][0]):
            module = name.removesuffix(".weight")
            made |= {f"{module}.{part}": values for part, values in _encoded(held, layout, dtype).items()}
        else:
            values = np.concatenate([np.asarray(each).reshape(-1, *tensor.shape[1:]) for each in held])
            with np.errstate(over="ignore"):
                made[name] = values.astype(dtype)
            if not np.isfinite(made[name].astype(np.float32)).all():
                raise InputError(f"{name} has weights beyond float16's range of 65504; try int8 or fp8.")
    return made


# --- one matrix -------------------------------------------------------------------------------------------------------


def _parts(layout: Layout, rows: int, columns: int, dtype: np.dtype) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each tensor of a matrix."""
    per_word, groups = 32 // layout.bits, columns // layout.group
    match layout.method:
        case "gptq":
            return {
                "qweight": ((columns // per_word, rows), _WORD), "qzeros": ((groups, rows // per_word), _WORD),
                "scales": ((groups, rows), dtype), "g_idx": ((columns,), _WORD),
            }  # fmt: skip
        case "awq":
            return {
                "qweight": ((columns, rows // per_word), _WORD), "qzeros": ((groups, rows // per_word), _WORD),
                "scales": ((groups, rows), dtype),
            }  # fmt: skip
        case "int8":
            return {"weight": ((rows, columns), np.dtype(np.int8)), "weight_scale": ((rows, 1), dtype)}
        case "fp8":
            scales = (-(-rows // FP8_BLOCK), columns // FP8_BLOCK)
            return {
                "weight": ((rows, columns), np.dtype(ml_dtypes.float8_e4m3fn)), "weight_scale_inv": (scales, dtype),
            }  # fmt: skip


def _encoded(held: list[Any], layout: Layout, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Those of `_parts`, of a matrix or of several below each other (Qwen1's q, k and v), in numpy arrays."""
    first = held[0]
    if layout.method == "int8":
        values, scale = (np.concatenate([getattr(each, name) for each in held]) for name in ("values", "scale"))
        return {"weight": values, "weight_scale": scale.astype(dtype)[:, None]}
    values = np.concatenate([each.values.reshape(len(each.values), -1) for each in held])
    scale = np.concatenate([each.scale for each in held]).astype(dtype)
    if layout.method == "fp8":
        return {"weight": values, "weight_scale_inv": np.ascontiguousarray(scale[::FP8_BLOCK])}
    middle = np.uint8(1 << (layout.bits - 1))
    codes = values.astype(np.int8).view(np.uint8) + middle  # [out, in], from 0 on
    zeros = np.full(scale.shape, middle)
    if first.zero is not None:
        zeros = np.concatenate([each.zero for each in held]).astype(np.int8).view(np.uint8) + middle
    scales = np.ascontiguousarray(scale.T)
    if layout.method == "awq":
        words = (_awq_words(codes), _awq_words(zeros))
        return {"qweight": words[0], "qzeros": words[1], "scales": scales}
    group_of = np.arange(values.shape[1], dtype=np.int32) // layout.group
    if first.order is not None:
        where = np.argsort(first.order)
        group_of, codes = group_of[where], codes[:, where]
    zeros = (zeros - np.uint8(1)) & np.uint8(2**layout.bits - 1)  # which readers of the first format add again
    return {
        "qweight": np.ascontiguousarray(_words(codes, layout.bits).T),
        "qzeros": _words(np.ascontiguousarray(zeros.T), layout.bits),
        "scales": scales,
        "g_idx": group_of,
    }


def _words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Of uint8 [n, k] the int32 [n, k * bits / 32] that hold them, the first lowest."""
    fields = fields.reshape(len(fields), -1, 32 // bits).astype(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(fields << shifts, axis=-1).view(np.int32)


def _awq_words(codes: np.ndarray) -> np.ndarray:
    """Of codes [out, k] the words [k, out / 8]."""
    columns = np.ascontiguousarray(codes.T).reshape(codes.shape[1], -1, 8)
    return _words(columns[..., np.argsort(AWQ_ORDER)].reshape(codes.shape[1], -1), 4)


# --- config.json ------------------------------------------------------------------------------------------------------


def quantization_config(layout: Layout, config: ModelConfig) -> dict[str, Any]:
    """As gptqmodel, AutoAWQ and llm-compressor write it, and Qwen3's FP8 releases have it."""
    meta = {"quantizer": [f"qwen-jax:{importlib.metadata.version('qwen-jax')}"]}
    routers = _names(config, lambda leaf: leaf.path.split("/")[2] in ("router", "shared_gate"))
    match layout.method:
        case "gptq":
            said = {
                "quant_method": "gptq", "checkpoint_format": "gptq", "bits": layout.bits, "group_size": layout.group,
                "desc_act": layout.desc_act, "sym": True, "lm_head": False, "pack_dtype": "int32",
                "static_groups": False, "true_sequential": True, "meta": meta,
            }  # fmt: skip
            if config.moe:  # other programs take every Linear for quantised
                first = dataclasses.replace(config, num_layers=1, windows=())
                of_layer = [name.split(".", 3)[3] for name in _names(first, is_quantised)]
                said["modules_in_block_to_quantize"] = [of_layer]
            return said
        case "awq":
            return {
                "quant_method": "awq", "bits": 4, "group_size": layout.group, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": [*routers, "lm_head"] if routers else None,
            }  # fmt: skip
        case "fp8":
            return {
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK], "modules_to_not_convert": ["lm_head", *routers],
            }  # fmt: skip
        case "int8":
            common = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "actorder": None}
            weights = common | {"strategy": "channel", "dynamic": False}
            activations = common | {"strategy": "token", "dynamic": True}
            group = {
                "targets": ["Linear"], "weights": weights, "input_activations": activations,
                "output_activations": None, "format": "int-quantized",
            }  # fmt: skip
            return {
                "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group},
                "ignore": ["lm_head", *routers], "quantization_status": "compressed", "kv_cache_scheme": None,
            }  # fmt: skip


def _names(config: ModelConfig, wanted: Callable[[Leaf], bool]) -> list[str]:
    """Modules of all layers, by layer."""

    def found() -> Iterator[tuple[int, str]]:
        for leaf in leaves(config, "hf"):
            if leaf.path.startswith("layers/") and wanted(leaf):
                for unit in leaf.indices():
                    yield unit[0], leaf.tensor.format(*unit).removesuffix(".weight")

    return [name for _, name in sorted(dict.fromkeys(found()), key=lambda each: each[0])]
