"""Programs that use weights. `from infer import load` loads a model that answers."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load":  # lazily, so that `qwen-jax chat --help` does not import JAX
        from infer.qwen import load

        return load
    raise AttributeError(f"module 'infer' has no attribute {name!r}")
