"""Batches: dataclasses of channels, whose types and axes are named once, for the feed, the mesh and the compiler."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from qwen_jax.sharding import RULES, activation_sharding, constrain

PER_TOKEN = ("batch", "sequence")
ArrayOrSpec = Any
"""jax.Array; or its shape or sharding, in a tree of those."""


def channel(dtype: Any, axes: tuple[str, ...] = PER_TOKEN) -> Any:
    """A field of a batch: its dtype, and the logical axes of qwen_jax.sharding, of which "batch" is the first.

    0 is what a row of padding holds.
    """
    return dataclasses.field(metadata={"dtype": dtype, "axes": axes})


class TokenBatch(flax.struct.PyTreeNode):
    """Packed rows [B, T]. An objective that needs more derives its own batch, with more channels."""

    tokens: ArrayOrSpec = channel(jnp.int32)
    targets: ArrayOrSpec = channel(jnp.int32)  # the next token of the same document
    positions: ArrayOrSpec = channel(jnp.int32)  # from 0 in each segment
    segment_ids: ArrayOrSpec = channel(jnp.int32)  # 1, 2, ... in each row; 0 is padding
    loss_mask: ArrayOrSpec = channel(jnp.float32)  # weight of the target in the loss


Batch = TypeVar("Batch", bound=TokenBatch)


def channels(kind: type[TokenBatch]) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Name -> (dtype, axes)."""
    return {field.name: (field.metadata["dtype"], field.metadata["axes"]) for field in dataclasses.fields(kind)}


def abstract_batch(kind: type[Batch], rows: int, length: int) -> Batch:
    """A batch of `rows` rows of `length` tokens as jax.ShapeDtypeStruct leaves."""
    sizes = {"batch": rows, "sequence": length}
    return kind(
        **{
            name: jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in axes), dtype)
            for name, (dtype, axes) in channels(kind).items()
        }
    )


def batch_shardings(kind: type[Batch], mesh: Mesh, rows: int, length: int) -> Batch:
    """How a batch lies on the mesh: rows over data, fsdp and expert, the sequence over context."""
    shapes = abstract_batch(kind, rows, length)
    return kind(
        **{
            name: activation_sharding(mesh, getattr(shapes, name).shape, *axes)
            for name, (_, axes) in channels(kind).items()
        }
    )


def micro_batches(batch: Batch, count: int) -> Batch:
    """Every channel [B, ...] as [count, B / count, ...], every micro-batch with rows of every shard."""
    if (rows := batch.tokens.shape[0]) % count:
        raise InputError(f"a batch of {rows} rows cannot be cut into {count} micro-batches; use a divisor.")

    def cut(name: str, axes: tuple[str, ...]) -> jax.Array:
        array = getattr(batch, name)
        array = array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)
        return constrain(array, None, *axes)

    return batch.replace(**{name: cut(name, axes) for name, (_, axes) in channels(type(batch)).items()})


def check_rows(mesh: Mesh, rows: int, accumulate: int) -> None:
    """Raises InputError when a batch cannot be cut into micro-batches and each of them among the mesh."""
    parts = 1
    for axis in RULES.batch:
        parts *= mesh.shape[axis]
    if rows % (parts * accumulate):
        raise InputError(
            f"a batch of {rows} rows cannot be divided among {parts} parts of the mesh ({', '.join(RULES.batch)}) in "
            f"{accumulate} micro-batches; make data.batch_size a multiple of {parts * accumulate}."
        )
