"""How a layer declares a parameter."""

from typing import Any

import flax.linen as nn
from jax.nn.initializers import Initializer

from qwen_jax.errors import InputError
from qwen_jax.leaves import Weight, gathered


def declare(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """The module's float32 parameter `name` of `shape`, whose axes bear the logical names `axes` for sharding.

    A leaf that stands for such an array is given back as it is. Raises InputError if it stands for another shape.
    """
    held = module.get_variable("params", name)
    if not isinstance(held, Weight):
        return module.param(name, nn.with_logical_partitioning(init, axes), shape)
    if held.shape != shape:
        path = "/".join((*module.path, name))
        raise InputError(f"{path} stands for {held.shape}, but the configuration says {shape}; give one that fits.")
    return held


def declare_gathered(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> Any:
    """As `declare`, whole along what FSDP splits: as a layer computes with it."""
    return gathered(declare(module, name, init, shape, axes), axes)
