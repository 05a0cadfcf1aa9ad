"""`quantization_config` of Hugging Face's config.json: what its tools may write there, read or refused by name.

Which modules are quantised, in groups of which size and in which order of inputs, the tensors themselves say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from qwen_jax.checked import flag, mapping, shown
from qwen_jax.errors import InputError

_NAME = "quantization_config"


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How a folder's matrices are coded."""

    method: Literal["gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes"]
    bits: int = 8
    zero_offset: int = 0
    """What GPTQ's first format subtracts from zeros before it stores them."""
    symmetric: bool = False
    """All zeros of GPTQ or AWQ are in the middle of the integers' range."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, where they do."""


def parse(raw: object) -> Quantisation | None:
    """None where nothing is quantised. Raises InputError for a method, format or key that is not known."""
    if not raw:
        return None
    config = mapping(_NAME, raw)
    method = config.get("quant_method")
    if method == "bitsandbytes" and not any(config.get(f"load_in_{bits}bit") for bits in (4, 8)):
        return None  # both of its switches off, which older versions left in the file
    if not isinstance(method, str) or method not in _PARSERS:
        raise InputError(f"the checkpoint is quantised with {shown(method)}, which is not read; known: {_KNOWN}.")
    known, parser = _PARSERS[method]
    _refuse_unknown(f"{_NAME} of {method}", config, known)
    return parser(config)


def _refuse_unknown(name: str, config: Mapping[str, Any], known: str) -> None:
    names = {"quant_method", *known.split()}
    for key, value in config.items():
        if key not in names and value not in (None, False, [], {}, ""):
            raise InputError(f"{name} has the unknown key {shown(key)} = {shown(value)}; it may change the weights.")


def _one_of(name: str, value: object, known: Iterable[Any]) -> Any:
    known = list(known)
    if isinstance(value, bool) or value not in known:
        options = ", ".join(str(option) for option in known if option is not None)
        raise InputError(f"{_NAME} {name} is {shown(value)}, which is not read; known: {options}.")
    return value


def _gptq(config: Mapping[str, Any]) -> Quantisation:
    bits = _one_of("bits", config.get("bits"), (4, 8, 2))
    for name, overrides in mapping(f"{_NAME} dynamic", config.get("dynamic") or {}).items():
        changed = mapping(f"{_NAME} dynamic {shown(name)}", overrides).get("bits", bits)
        if not name.startswith("-:") and changed != bits:
            raise InputError(f"{_NAME} dynamic gives {shown(name)} other bits ({shown(changed)}), which is not read.")
    _one_of("pack_dtype", config.get("pack_dtype"), ("int32", None))
    formats = [config.get(key) or "gptq" for key in ("checkpoint_format", "format") if config.get(key)]
    for format in formats:
        _one_of("checkpoint_format", format, ("gptq", "gptq_v2"))
    return Quantisation("gptq", bits, 0 if "gptq_v2" in formats else 1, flag(f"{_NAME} sym", config.get("sym", False)))


def _awq(config: Mapping[str, Any]) -> Quantisation:
    _one_of("bits", config.get("bits", config.get("w_bit", 4)), (4,))
    version = config.get("version", "gemm")
    _one_of("version", version.lower() if isinstance(version, str) else version, ("gemm",))
    for key in ("format", "checkpoint_format"):
        _one_of(key, config.get(key), ("gemm", None))
    _one_of("pack_dtype", config.get("pack_dtype"), ("int32", None))
    return Quantisation("awq", 4, symmetric=not flag(f"{_NAME} zero_point", config.get("zero_point", True)))


def _fp8(config: Mapping[str, Any]) -> Quantisation:
    _one_of("fmt", config.get("fmt", "e4m3"), ("e4m3",))
    _one_of("activation_scheme", config.get("activation_scheme", "dynamic"), ("dynamic", "static"))
    _one_of("scale_fmt", config.get("scale_fmt"), ("float", None))
    return Quantisation("fp8", block=_block("weight_block_size", config.get("weight_block_size")))


def _bitsandbytes(config: Mapping[str, Any]) -> Quantisation:
    if config.get("load_in_8bit"):
        return Quantisation("bitsandbytes", 8)
    _one_of("bnb_4bit_quant_type", config.get("bnb_4bit_quant_type", "fp4"), ("nf4", "fp4"))
    _one_of("bnb_4bit_quant_storage", config.get("bnb_4bit_quant_storage", "uint8"), ("uint8",))
    return Quantisation("bitsandbytes", 4)


def _compressed_tensors(config: Mapping[str, Any]) -> Quantisation:
    _one_of("quantization_status", config.get("quantization_status", "compressed"), ("compressed",))
    _one_of("format", config.get("format"), (*_CT_FORMATS, "mixed-precision"))
    if mapping(f"{_NAME} sparsity_config", config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise InputError(f"{_NAME} has a sparsity_config, which is not read; use a checkpoint without sparsity.")
    if config.get("transform_config"):
        raise InputError(f"{_NAME} has a transform_config, which turns the weights and is not read.")
    if config.get("kv_cache_scheme"):
        raise InputError(f"{_NAME} has a kv_cache_scheme, which rounds keys and values and is not read.")
    blocks: set[tuple[int, int] | None] = set()
    for name, raw in mapping(f"{_NAME} config_groups", config.get("config_groups") or {}).items():
        group = mapping(f"{_NAME} config_groups {shown(name)}", raw)
        _refuse_unknown(
            f"{_NAME} config_groups {shown(name)}", group, "targets weights input_activations output_activations format"
        )
        if group.get("output_activations"):
            raise InputError(f"{_NAME} rounds output activations, which is not done here; no released Qwen does it.")
        _one_of("format of a group", group.get("format"), (*_CT_FORMATS, None))
        weights = mapping(f"{_NAME} weights", group.get("weights") or {})
        kind = (weights.get("type", "int"), weights.get("num_bits", 8))
        if kind not in [("int", 4), ("int", 8), ("float", 8)]:
            raise InputError(
                f"{_NAME} weights are of {shown(kind[1])} bits and type {shown(kind[0])}, which is not read."
            )
        _one_of("strategy", weights.get("strategy"), ("tensor", "channel", "group", "block", None))
        _one_of("actorder", weights.get("actorder"), ("group", "weight", "static", "dynamic", True, None))
        flag(f"{_NAME} symmetric", weights.get("symmetric", True))
        blocks.add(_block("block_structure", weights.get("block_structure")))
    if len(blocks - {None}) > 1:
        raise InputError(f"{_NAME} has groups of different block_structure, which is not read.")
    return Quantisation("compressed-tensors", block=next(iter(blocks - {None}), None))


def _block(name: str, value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = value.split("x") if isinstance(value, str) else value
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(str(size).isdigit() and int(size) for size in sizes):
        raise InputError(f"{_NAME} {name} is {shown(value)}; it must be two sizes, such as [128, 128].")
    return int(sizes[0]), int(sizes[1])


_CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")

# Keys that say how weights were made, how some program multiplies by them, or what the tensors show as well
_MADE = """bits group_size sym desc_act static_groups true_sequential damp_percent damp_auto_increment dataset tokenizer
batch_size model_seqlen max_input_length pad_token_id block_name_to_quantize module_name_preceding_first_block
modules_in_block_to_quantize cache_block_outputs use_cuda_fp16 use_exllama exllama_config disable_exllama backend
lm_head meta method model_name_or_path model_file_base_name mse pack_impl offload_to_disk act_group_aware hyb_act
mock_quantization quantizer versionable uri"""
_PARSERS: dict[str, Any] = {
    "gptq": (f"{_MADE} checkpoint_format format pack_dtype dynamic", _gptq),
    "awq": (
        f"{_MADE} w_bit q_group_size zero_point version format checkpoint_format pack_dtype modules_to_not_convert "
        "do_fuse fuse_max_seq_len modules_to_fuse",
        _awq,
    ),
    "fp8": (
        "activation_scheme fmt weight_block_size modules_to_not_convert ignored_layers scale_fmt "
        "is_checkpoint_fp8_serialized",
        _fp8,
    ),
    "bitsandbytes": (
        """load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_quant_type bnb_4bit_quant_storage
        bnb_4bit_use_double_quant bnb_4bit_compute_dtype llm_int8_threshold llm_int8_skip_modules
        llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight""",
        _bitsandbytes,
    ),
    "compressed-tensors": (
        """config_groups format ignore quantization_status global_compression_ratio kv_cache_scheme sparsity_config
        transform_config version""",
        _compressed_tensors,
    ),
}  # fmt: skip
_KNOWN = ", ".join(_PARSERS)
