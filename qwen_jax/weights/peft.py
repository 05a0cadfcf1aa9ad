"""PEFT's adapter folders (adapter_config.json, adapter_model.safetensors), read, written and merged."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.checked import flag, mapping, number, printable, read_json, shown
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.weights._files import new_folder
from qwen_jax.weights.checkpoint import Checkpoint, Index
from qwen_jax.weights.export import write_json
from qwen_jax.weights.load import get_leaf, put_leaf
from qwen_jax.weights.names import Leaf, leaves
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.safetensors import read_safetensors

_PREFIX = "base_model.model."
_TABLES = ("embed/embedding", "lm_head/embedding")

# Keys that change what is computed, and the values at which they change nothing
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,), "modules_to_save": (None, []),
    "layer_replication": (None,), "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
    "target_parameters": (None, []), "use_qalora": (False,), "arrow_config": (None,), "megatron_config": (None,),
    "use_bdlora": (None, False), "velora_config": (None,), "monteclora_config": (None,),
    "task_type": (None, "CAUSAL_LM"), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
    "peft_type": ("LORA",),
}  # fmt: skip
_READ = frozenset("r lora_alpha rank_pattern alpha_pattern use_rslora use_dora".split())
# How it was made, and what the tensors show as well
_MADE = frozenset(
    """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core parent_library
    peft_version qalora_group_size revision runtime_config target_modules""".split()
)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one leaf: scaling * b a, float32 arrays with the leaf's axes of layers and experts in
    front. Layers that it leaves alone have b = 0."""

    a: np.ndarray  # [*front, r, *in]
    b: np.ndarray  # [*front, *out, r]
    magnitude: np.ndarray | None  # [*front, *out], for DoRA
    scaling: float


Adapter = Mapping[str, LowRank]
"""By paths of our parameter tree."""


# --- in ---------------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in a PEFT folder, for a model of this configuration.

    Raises InputError for what is no LoRA, asks for what is not supported, or does not fit the model.
    """
    folder = Path(folder)
    raw = mapping(f"{folder}/adapter_config.json", read_json(folder / "adapter_config.json"))
    try:
        scaling = _scaling(raw)
    except InputError as error:
        raise InputError(f"{folder}/adapter_config.json: {error}") from None
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise InputError(f"{folder} lacks adapter_model.safetensors; save the adapter as safetensors, as PEFT does.")
    tensors = {name: tensor.array().astype(np.float32) for name, tensor in read_safetensors(file).items()}
    tensors = {name: array for name, array in tensors.items() if not name.endswith(".base_layer.weight")}
    names = {leaf.path: {unit: _module(leaf, unit) for unit in leaf.indices()} for leaf in leaves(config, "hf")}
    used: set[str] = set()
    weights = {}
    for leaf in leaves(config, "hf"):
        parts = {unit: _parts(tensors, module, used) for unit, module in names[leaf.path].items()}
        if any(parts.values()):
            if leaf.path in _TABLES and config.tie_word_embeddings:
                raise InputError(
                    f"{folder} adapts {leaf.path}, but this model's embedding and head are one table, so that it would "
                    "change both; untie them first, or train an adapter without it."
                )
            scales = {
                unit: scaling(module, _rank(part)) for unit, module in names[leaf.path].items() if (part := parts[unit])
            }
            weights[leaf.path] = _low_rank(folder, leaf, parts, scales)
    if extra := [name for name in tensors if name not in used]:
        raise InputError(f"{folder} adapts {printable(min(extra))}, which is no matrix of this {config.model_type}.")
    if not weights:
        raise InputError(f"{folder} holds no LoRA weights; it must have lora_A and lora_B of at least one module.")
    return weights


def trained_base(folder: str | Path, checkpoint: Checkpoint) -> Checkpoint:
    """The model that a PEFT folder names as its base if it is on this machine and shaped as `checkpoint`; else that."""
    named = read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not (named == "default" or os.path.exists(named)):
        return checkpoint
    try:
        base = open_checkpoint(named)
    except InputError:
        return checkpoint
    shapes, wanted = ({leaf.path: leaf.shape for leaf in each.leaves} for each in (base, checkpoint))
    return base if shapes == wanted else checkpoint


def _scaling(raw: Mapping[str, Any]) -> Any:
    """The function (module, rank) -> factor of b a. Raises InputError for a key that is not known."""
    for key, value in raw.items():
        if key in _OFF and value not in _OFF[key]:
            raise InputError(f"{key} = {shown(value)} is not supported; only {shown(_OFF[key][0])} is.")
        if key not in _OFF and key not in _READ and key not in _MADE and value not in (None, False, [], {}):
            raise InputError(f"unknown key {shown(key)} = {shown(value)}; it may change what the adapter computes.")
    if raw.get("peft_type") != "LORA":
        raise InputError(f"peft_type is {shown(raw.get('peft_type'))}; only LORA is supported.")
    alpha = number("lora_alpha", raw.get("lora_alpha", 8), least=0.0)
    patterns = mapping("alpha_pattern", raw.get("alpha_pattern") or {})
    rslora = flag("use_rslora", raw.get("use_rslora", False))
    try:
        compiled = [
            (re.compile(rf"(.*\.)?({key})$"), number("alpha_pattern", a, least=0.0)) for key, a in patterns.items()
        ]
    except re.error as error:
        raise InputError(f"alpha_pattern holds no regular expression ({error}).") from None

    def scaling(module: str, rank: int) -> float:
        own = next((value for pattern, value in compiled if pattern.match(module)), alpha)
        return own / (math.sqrt(rank) if rslora else rank)

    return scaling


def _module(leaf: Leaf, unit: tuple[int, ...]) -> str:
    """PEFT's name of the module that holds a leaf's tensor."""
    return leaf.tensor.format(*unit).removesuffix(".weight")


def _parts(tensors: Mapping[str, np.ndarray], module: str, used: set[str]) -> tuple[Any, Any, Any] | None:
    """(a [r, in], b [out, r], magnitude [out] or None) of a module."""
    name = f"{_PREFIX}{module}"
    a, b, turned = f"{name}.lora_A.weight", f"{name}.lora_B.weight", False
    if a not in tensors:  # of a table, whose rows are its inputs
        a, b, turned = f"{name}.lora_embedding_B", f"{name}.lora_embedding_A", True
    if a not in tensors and b not in tensors:
        return None
    if a not in tensors or b not in tensors:
        raise InputError(f"the adapter has only one of {printable(a)} and {printable(b)}; save it again.")
    magnitude = next(
        (m for m in (f"{name}.lora_magnitude_vector", f"{name}.lora_magnitude_vector.weight") if m in tensors), None
    )
    used |= {a, b, *([magnitude] if magnitude else [])}
    found = (tensors[a], tensors[b], tensors[magnitude].reshape(-1) if magnitude else None)
    return (found[0].T, found[1].T, found[2]) if turned else found


def _rank(part: Any) -> int:
    return part[0].shape[0]


def _low_rank(folder: Path, leaf: Leaf, parts: Mapping[Any, Any], scales: Mapping[Any, float]) -> LowRank:
    """One leaf's layers and experts together: of the largest rank, and of one scaling, by which b's differ."""
    front = leaf.shape[: len(leaf.shape) - len(leaf.unit)]
    outer, inner = leaf.unit[: leaf.row_axes], leaf.unit[leaf.row_axes :]
    rows, columns = math.prod(outer), math.prod(inner)
    rank, common = max(_rank(part) for part in parts.values() if part), next(iter(scales.values()))
    a, b = np.zeros((*front, rank, columns), np.float32), np.zeros((*front, rows, rank), np.float32)
    magnitudes = [part is not None and part[2] is not None for part in parts.values()]
    magnitude = np.zeros((*front, rows), np.float32) if any(magnitudes) else None
    if magnitude is not None and not all(magnitudes):
        raise InputError(f"{folder} has a DoRA magnitude in some layers alone, which is not supported.")
    for unit, part in parts.items():
        if part is None:
            continue
        its_a, its_b, its_magnitude = part
        file_rows = leaf.file_shape[0]
        if its_a.ndim != 2 or its_a.shape != (len(its_a), columns) or its_b.shape != (file_rows, len(its_a)):
            raise InputError(
                f"{folder}: {printable(_module(leaf, unit))} has factors of shapes {its_b.shape} and {its_a.shape}, "
                f"but the model's matrix is {(file_rows, columns)}; the adapter is of another model."
            )
        own = slice(leaf.first_row, leaf.first_row + rows)
        a[unit][: len(its_a)] = its_a
        b[unit][:, : len(its_a)] = its_b[own] * (scales[unit] / common if common else 1.0)
        if magnitude is not None:
            if its_magnitude.shape != (file_rows,):
                raise InputError(f"{folder}: a magnitude of {printable(_module(leaf, unit))} has a wrong shape.")
            magnitude[unit] = its_magnitude[own]
    return LowRank(
        a.reshape(*front, rank, *inner),
        b.reshape(*front, *outer, rank),
        None if magnitude is None else magnitude.reshape(*front, *outer),
        common,
    )


def apply_adapter(params: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Parameters, stacked or not, with a `Lora` over each leaf that is adapted; the base's arrays are shared."""
    import jax.numpy as jnp

    from qwen_jax.leaves import Lora
    from qwen_jax.unstacked import Unstacked

    def over(base: Any, low: LowRank, layer: int | None = None) -> Lora:
        arrays = (low.a, low.b, *(() if low.magnitude is None else (low.magnitude,)))
        return Lora(base, *(jnp.asarray(x if layer is None else x[layer]) for x in arrays), scaling=low.scaling)

    def copied(tree: Any) -> Any:
        return {key: copied(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree

    out = copied(params)
    apart = isinstance(out["layers"], Unstacked)
    if apart:
        out["layers"] = Unstacked(copied(layer) for layer in out["layers"])
    for path, low in adapter.items():
        section, _, rest = path.partition("/")
        if apart and section == "layers":
            for i, layer in enumerate(out["layers"]):
                put_leaf(layer, rest, over(get_leaf(layer, rest), low, i))
        else:
            put_leaf(out, path, over(get_leaf(out, path), low))
    return out


# --- out --------------------------------------------------------------------------------------------------------------


def save_adapter(adapter: Adapter, config: ModelConfig, folder: str | Path, *, base: str) -> None:
    """Writes the PEFT folder; `base` names the model that it was trained on.

    Raises InputError when the folder exists or cannot be written, or PEFT has no words for the adapter.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    targets, ranks, alphas = set(), {}, {}
    by_path = {leaf.path: leaf for leaf in leaves(config, "hf")}
    for path, low in adapter.items():
        leaf = by_path[path]
        if leaf.first_row or leaf.file_shape[0] != leaf.rows:
            raise InputError(f"PEFT adapts Qwen1's queries, keys and values as one matrix, and {path} is but a part.")
        rank = low.b.shape[-1]
        for unit in leaf.indices():
            name = f"{_PREFIX}{_module(leaf, unit)}"
            targets.add(name.rpartition(".")[2])
            ranks[name.rpartition(".")[2]], alphas[name.rpartition(".")[2]] = rank, low.scaling * rank
            a, b = low.a[unit].reshape(rank, -1), low.b[unit].reshape(-1, rank)
            if path == "embed/embedding":
                tensors |= {f"{name}.lora_embedding_A": b.T, f"{name}.lora_embedding_B": a.T}
            else:
                tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            if low.magnitude is not None:
                tensors[f"{name}.lora_magnitude_vector"] = low.magnitude[unit].reshape(-1)
    most = max(ranks, key=ranks.__getitem__)
    rank, alpha = ranks[most], alphas[most]
    written = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(targets), "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True,
        "use_dora": any(low.magnitude is not None for low in adapter.values()), "use_rslora": False,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }  # fmt: skip
    with new_folder(Path(folder)) as out:
        tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(out / "adapter_config.json", written)


# --- merged -----------------------------------------------------------------------------------------------------------


class MergedCheckpoint(Checkpoint):
    """A checkpoint with an adapter added to it: each sum is made in float32, and rounded once."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self.source, self.config, self.leaves = base.source, base.config, base.leaves
        self.dtypes, self.hf_extra = base.dtypes, base.hf_extra
        self._by_path = {leaf.path: leaf for leaf in base.leaves}

    def _read(self, path: str, index: Index, out: np.ndarray) -> None:
        low = self._adapter.get(path)
        if low is None:
            self._base.read(path, index, out)
            return
        leaf = self._by_path[path]
        num_front = low.a.ndim + low.b.ndim - 2 - len(leaf.shape)
        num_out = low.b.ndim - 1 - num_front
        bounds = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
        for unit in itertools.product(*bounds[:num_front]):
            rows, columns = index[num_front : num_front + num_out], index[num_front + num_out :]
            whole_rows = (*(slice(i, i + 1) for i in unit), *rows, *(slice(None) for _ in columns))
            a, b = low.a[unit], low.b[(*unit, *rows)]
            wide = np.empty((*[1] * num_front, *b.shape[:-1], *a.shape[1:]), np.float32)
            self._base.read(path, whole_rows, wide)
            total = wide.reshape(*b.shape[:-1], *a.shape[1:]) + low.scaling * np.tensordot(b, a, 1)
            if low.magnitude is not None:
                over = tuple(range(num_out, total.ndim))
                stretch = low.magnitude[(*unit, *rows)] / np.sqrt(np.sum(np.square(total), over))
                total *= stretch.reshape(*stretch.shape, *[1] * len(over))
            place = tuple(i - bound.start for i, bound in zip(unit, bounds, strict=False))
            out[place] = total[(*[slice(None)] * num_out, *columns)]

    def tokenizer(self) -> Any:
        return self._base.tokenizer()

    def generation_config(self) -> dict[str, Any]:
        return self._base.generation_config()

    def write_assets(self, folder: Path) -> None:
        self._base.write_assets(folder)
