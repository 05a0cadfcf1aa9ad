"""What is chosen per platform, as one value: decided at the edge of a program, from where its arrays lie.

    with Backend.of(params).entered():
        ...  # whatever is traced here is made for that backend

It is entered like a mesh, and JAX traces a function anew where it changes. Inside, `current_backend` gives it.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

_ENTERED = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class Backend:
    """The choices; the measurements behind them are in docs/performance.md."""

    kernels: Literal["cpu", "tpu", "gpu"]
    """whose kernels, and whose ways around a compiler, are used"""
    cores: int = 1
    """cores of a chip that share its memory: 2 on TPU v4 and v5p"""
    product_dtype: DTypeLike | None = None
    """in which products are asked for; None: in the type that they will be rounded to"""
    cache_dtype: DTypeLike | None = None
    """of keys and values that are kept, int8 with a scale for each; None: as the activations"""
    min_decode_rows: int = 1
    """rows that take as long to decode as one"""
    ragged_exchange: bool = True
    """whether devices can exchange pieces of unequal lengths"""
    native: bool = False
    """whether the C kernels of kernels/native serve: products that round activations to int8, attention of one query"""
    integer_products: bool = False
    """whether `Int8` rounds activations to int8 as well, a token at a time, and multiplies integers"""
    interpret: bool = False
    """kernels are interpreted, which any platform can do: for tests"""

    @classmethod
    def of(cls, where: Any) -> Backend:
        """The backend of a device, of a mesh or of the arrays in a tree; of a tree without any, JAX's default."""
        if isinstance(where, Mesh):
            where = where.devices.flat[0]
        if not hasattr(where, "platform"):
            arrays = [leaf for leaf in jax.tree.leaves(where) if isinstance(leaf, jax.Array)]
            where = next(iter(arrays[0].devices())) if arrays else _default_device()
        match where.platform:
            case "tpu":
                # the matrix unit works on 8 rows at a time
                return cls("tpu", cores=getattr(where, "num_cores", None) or 1, min_decode_rows=8)
            case "cuda" | "rocm" | "gpu":
                return cls("gpu")
            case _:
                # XLA:CPU takes the matrix unit for float32 results only, copies a whole bfloat16 cache to update it,
                # and has no ragged exchange
                return cls(
                    "cpu",
                    product_dtype=jnp.dtype(jnp.float32),
                    cache_dtype=jnp.dtype(jnp.float32),
                    ragged_exchange=False,
                )

    def entered(self) -> AbstractContextManager[Any]:
        """A context in which functions are traced for this backend."""
        return _ENTERED(self)


def _default_device() -> Any:
    default = jax.config.values["jax_default_device"]  # a device, the name of a platform, or None
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def current_backend() -> Backend:
    """The backend that was entered, or else that of the mesh, or of JAX's default device."""
    if _ENTERED.value is not None:
        return _ENTERED.value
    # a mesh's devices need not be of this machine
    return Backend.of(getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None))
