"""Long-context schemes by name, to put on a model in place of its own: `yarn:4`, `ntk+logn`, `dca:4096,1024`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qwen_jax.config import DualChunk, DynamicNtkScaling, LinearScaling, ModelConfig, NtkScaling, YarnScaling
from qwen_jax.errors import InputError

GRAMMAR = (
    "own (the checkpoint's), none, or parts joined by '+': linear:FACTOR, ntk:FACTOR, ntk (dynamic, as Qwen1), logn, "
    "window:FIRST-LAST (keys that the first layer sees, growing evenly to the last's), yarn:FACTOR, dca:CHUNK,LOCAL"
)


def trained_length(config: ModelConfig) -> int:
    """Tokens of the sequences that a checkpoint was trained on, as far as its config says."""
    scaling = config.rope_scaling
    if isinstance(scaling, DynamicNtkScaling):
        return scaling.trained_length
    if isinstance(scaling, YarnScaling):
        return scaling.original_length
    if config.dual_chunk:
        return config.dual_chunk.original_length or config.dual_chunk.chunk_size
    return config.logn_trained_length or config.max_position_embeddings


def with_scheme(config: ModelConfig, scheme: str, *, trained: int | None = None) -> ModelConfig:
    """`config` with the scheme that the text names (see GRAMMAR) instead of its own.

    trained: the length that schemes start from; default what the config says. Raises InputError for other text.
    """
    if scheme == "own":
        return config
    trained = trained or trained_length(config)
    nothing: dict[str, Any] = dict.fromkeys(("rope_scaling", "logn_trained_length", "dual_chunk")) | {"windows": ()}
    changes: dict[str, Any] = {}
    for part in [] if scheme == "none" else scheme.split("+"):
        name, _, value = part.partition(":")
        try:
            found = _PARTS[name](value, config, trained)
        except (KeyError, ValueError):
            raise InputError(f"{part!r} in {scheme!r} is not a long-context scheme; expected {GRAMMAR}.") from None
        if twice := sorted(set(found) & set(changes)):
            raise InputError(f"{scheme!r} sets {twice[0]} twice; name each kind of scheme once.")
        changes |= found
    return dataclasses.replace(config, **(nothing | changes))


def _factor(value: str) -> float:
    factor = float(value)
    if factor < 1:
        raise ValueError
    return factor


def _ntk(value: str, config: ModelConfig, trained: int) -> dict[str, Any]:
    return {"rope_scaling": NtkScaling(_factor(value)) if value else DynamicNtkScaling(trained)}


def _logn(value: str, config: ModelConfig, trained: int) -> dict[str, Any]:
    if value:
        raise ValueError
    return {"logn_trained_length": trained}


def _window(value: str, config: ModelConfig, trained: int) -> dict[str, Any]:
    first, last = map(int, value.split("-"))
    steps = max(config.num_layers - 1, 1)
    return {"windows": tuple(first + (last - first) * layer // steps for layer in range(config.num_layers))}


def _dca(value: str, config: ModelConfig, trained: int) -> dict[str, Any]:
    chunk, local = map(int, value.split(","))
    if not 0 < local < chunk:
        raise ValueError
    return {"dual_chunk": DualChunk(chunk, local, trained)}


_PARTS: dict[str, Callable[[str, ModelConfig, int], dict[str, Any]]] = {
    "linear": lambda value, config, trained: {"rope_scaling": LinearScaling(_factor(value))},
    "yarn": lambda value, config, trained: {"rope_scaling": YarnScaling(_factor(value), trained)},
    "ntk": _ntk,
    "logn": _logn,
    "window": _window,
    "dca": _dca,
}
