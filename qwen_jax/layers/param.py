"""How a layer declares a parameter."""

from typing import Any

import flax.linen as nn
from jax.nn.initializers import Initializer

from qwen_jax.sharding import gathered


def declare(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """The module's float32 parameter `name` of `shape`, whose axes bear the logical names `axes` for sharding."""
    param: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape)
    return gathered(param, axes)
