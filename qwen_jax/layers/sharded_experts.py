"""Mixture of experts across a mesh: each device routes its own tokens, and rows travel to the devices of their experts.

No token is dropped. A device has room for somewhat more rows than it gets when all experts are used alike; what is more
than that comes in further rounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from qwen_jax.backend import current_backend
from qwen_jax.leaves import Leaf, gathered_in_shards, specs
from qwen_jax.sharding import activation_spec

Kernels = tuple[Leaf, ...]
# The loop, in a compiled program, that a step does not enter while the experts are used nearly alike.
FURTHER_ROUNDS = "further_rounds"

# Rows that a device has room for, to those that it gets when all experts are used alike.
ROOM = 1.25

# Logical axes of the gate's and up's kernels, and of the down's.
WIDE, NARROW = ("expert", "expert_mlp", "expert_embed"), ("expert", "expert_embed", "expert_mlp")


def sharded_experts(
    routed: Callable[..., jax.Array],
    expert_mlp: Callable[..., jax.Array],
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: Kernels,
    mesh: AbstractMesh,
) -> jax.Array:
    """The experts of layers/moe.py with x [B, T, D], chosen and weights [B, T, k] and the kernels on a mesh; [B, T, D].

    Experts are split over `expert`, and their features over `tensor`; what FSDP splits is gathered here, so that the
    kernels' gradients are scattered.
    """
    tensor = mesh.shape["tensor"]
    x_spec = activation_spec(mesh, x.shape, "batch", "sequence", None)
    axes = (WIDE, WIDE, NARROW)
    kernel_specs = tuple(specs(*pair, mesh) for pair in zip(kernels, axes, strict=True))
    # where the tokens divide, the partial sums over `tensor` leave as the parts that the residual stream is kept in
    scatter = tensor > 1 and x.shape[1] % (mesh.shape["context"] * tensor) == 0
    y_spec = activation_spec(mesh, x.shape, "batch", "residual" if scatter else "sequence", None)

    def body(x: jax.Array, chosen: jax.Array, weights: jax.Array, kernels: Kernels) -> jax.Array:
        kernels = tuple(gathered_in_shards(*each) for each in zip(kernels, axes, kernel_specs, strict=True))
        parts = mesh.shape["expert"]
        experts = expert_mlp if parts == 1 else functools.partial(_exchanged, expert_mlp, mesh)
        flat = x.reshape(-1, x.shape[-1])
        y = routed(flat, chosen.reshape(len(flat), -1), weights.reshape(len(flat), -1), kernels, experts, parts)
        y = y.reshape(x.shape)
        if scatter:
            y = lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)
        elif tensor > 1:
            y = lax.psum(y, "tensor")
        return y.astype(x.dtype)

    in_specs = (x_spec, x_spec, x_spec, kernel_specs)
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=y_spec, check_vma=False)(
        x, chosen, weights, kernels
    )


def _exchanged(
    expert_mlp: Callable[..., jax.Array], mesh: AbstractMesh, rows: jax.Array, sizes: jax.Array, kernels: Kernels
) -> jax.Array:
    """`expert_mlp` where this device holds 1/n of the experts; rows [R, D] are those of its own tokens, by expert."""
    devices, held = mesh.shape["expert"], kernels[0].shape[0]
    sizes = lax.all_gather(sizes.reshape(devices, held), "expert")  # [from, to, expert there]
    room = min(8 * math.ceil(len(rows) * ROOM / 8), devices * len(rows))
    # the same everywhere, though rows travel among the devices of one `expert` axis only
    rounds = lax.pmax(-(-jnp.max(jnp.sum(sizes, axis=(0, 2))) // room), mesh.axis_names)
    return _in_rounds(expert_mlp, room, rows, kernels, sizes, rounds)


class _Round(flax.struct.PyTreeNode):
    """Which rows travel in a round: int32 [from, to, expert there], of each group that one device has for another's
    expert where it begins among the sender's rows, where in the receiver's room, and how many rows of it travel."""

    begins: jax.Array
    lands: jax.Array
    sizes: jax.Array

    @classmethod
    def of(cls, index: jax.Array | int, sizes: jax.Array, room: int) -> _Round:
        """Round `index` of the rows `sizes` [from, to, expert there]: a receiver's are numbered by expert, and by
        sender within one, and every round takes the next `room` of them."""
        devices, held = sizes.shape[1:]
        begins = jnp.cumsum(sizes.reshape(devices, -1), axis=1).reshape(sizes.shape) - sizes
        by_expert = jnp.transpose(sizes, (1, 2, 0))  # [to, expert there, from]
        lands = jnp.cumsum(by_expert.reshape(devices, -1), axis=1).reshape(by_expert.shape) - by_expert
        lands = jnp.transpose(lands, (2, 0, 1)) - index * room
        first, last = jnp.clip(lands, 0, room), jnp.clip(lands + sizes, 0, room)
        return cls(begins + jnp.clip(-lands, 0, sizes), first, last - first)

    @property
    def group_sizes(self) -> jax.Array:
        """Rows that each expert of this device gets."""
        return jnp.sum(self.sizes[:, lax.axis_index("expert")], axis=0)

    def send(self, rows: jax.Array, buffer: jax.Array) -> jax.Array:
        """The rows [R, D] that devices send, grouped by expert in the receiver's room [room, D]."""
        return _ragged_exchange(rows, buffer, self.begins, self.sizes, self.lands)

    def back(self, rows: jax.Array, buffer: jax.Array) -> jax.Array:
        """The way back, of what became of them [room, D], to their places among the sender's [R, D]."""
        begins, sizes, lands = (jnp.swapaxes(x, 0, 1) for x in (self.begins, self.sizes, self.lands))
        return _ragged_exchange(rows, buffer, lands, sizes, begins)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(
    expert_mlp: Callable[..., jax.Array], room: int, rows: jax.Array, kernels: Kernels, sizes: jax.Array, rounds: Any
) -> jax.Array:
    """What each row [R, D] becomes; sizes [from, to, expert there]. The first round is the only one as a rule."""
    return _forward(expert_mlp, room, rows, kernels, sizes, rounds)[0]


def _forward(
    expert_mlp: Callable[..., jax.Array], room: int, rows: jax.Array, kernels: Kernels, sizes: jax.Array, rounds: Any
) -> tuple[jax.Array, Any]:
    def further(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        this = _Round.of(carry[0], sizes, room)
        out = expert_mlp(this.send(rows, _room_for(rows, room)), this.group_sizes, kernels)
        return carry[0] + 1, this.back(out.astype(rows.dtype), carry[1])

    first = _Round.of(0, sizes, room)
    out, pull = _pull(expert_mlp, first, checkpoint_name(first.send(rows, _room_for(rows, room)), "received"), kernels)
    result = first.back(out, jnp.zeros_like(rows))
    with jax.named_scope(FURTHER_ROUNDS):
        _, result = lax.while_loop(lambda carry: carry[0] < rounds, further, (jnp.ones_like(rounds), result))
    return result, (rows, kernels, sizes, rounds, pull)


def _backward(
    expert_mlp: Callable[..., jax.Array], room: int, residuals: Any, d_result: jax.Array
) -> tuple[jax.Array, Any, None, None]:
    rows, kernels, sizes, rounds, pull = residuals

    def of_round(this: _Round, pull: Any, d_rows: jax.Array) -> tuple[jax.Array, Any]:
        d_received, d_kernels = pull(this.send(d_result, _room_for(rows, room)))
        return this.back(d_received, d_rows), d_kernels

    def further(carry: Any) -> Any:
        index, d_rows, d_kernels = carry
        this = _Round.of(index, sizes, room)
        _, pull = _pull(expert_mlp, this, this.send(rows, _room_for(rows, room)), kernels)
        d_rows, more = of_round(this, pull, d_rows)
        return index + 1, d_rows, jax.tree.map(jnp.add, d_kernels, more)

    d_rows, d_kernels = of_round(_Round.of(0, sizes, room), pull, jnp.zeros_like(rows))
    with jax.named_scope(FURTHER_ROUNDS):
        start = (jnp.ones_like(rounds), d_rows, d_kernels)
        _, d_rows, d_kernels = lax.while_loop(lambda carry: carry[0] < rounds, further, start)
    arrays, treedef = jax.tree.flatten(kernels)
    gradients = iter(d_kernels)
    floating = (jnp.issubdtype(array.dtype, jnp.floating) for array in arrays)
    return d_rows, treedef.unflatten([next(gradients) if found else None for found in floating]), None, None


_in_rounds.defvjp(_forward, _backward)


def _room_for(rows: jax.Array, room: int) -> jax.Array:
    return jnp.zeros((room, rows.shape[1]), rows.dtype)


def _pull(
    expert_mlp: Callable[..., jax.Array], this: _Round, received: jax.Array, kernels: Kernels
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, Any]]]:
    """What the experts make of the rows received, in their dtype, and the gradients of rows and kernels from its."""
    arrays, treedef = jax.tree.flatten(kernels)
    floating = [i for i, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]

    def run(x: jax.Array, trained: list[jax.Array]) -> jax.Array:
        merged = dict(enumerate(arrays)) | dict(zip(floating, trained, strict=True))
        return expert_mlp(x, this.group_sizes, treedef.unflatten(merged.values())).astype(x.dtype)

    return jax.vjp(run, received, [arrays[i] for i in floating])


def _ragged_exchange(
    rows: jax.Array, buffer: jax.Array, begins: jax.Array, sizes: jax.Array, lands: jax.Array
) -> jax.Array:
    """`buffer` with what all devices send: of each group [from, to, n] `sizes` rows, from `begins` on among the
    sender's, which lie from `lands` on in the receiver's buffer."""
    me = lax.axis_index("expert")
    if current_backend().ragged_exchange:
        ours, theirs = (x.reshape(-1) for x in (sizes[me], sizes[:, me]))
        return lax.ragged_all_to_all(
            rows, buffer, begins[me].reshape(-1), ours, lands[me].reshape(-1), theirs, axis_name="expert"
        )
    # everybody's rows travel everywhere
    everything = lax.all_gather(rows, "expert", tiled=True)
    senders = jnp.arange(len(sizes))[:, None]
    begins, lands, sizes = (x[:, me].reshape(-1, 1) for x in (begins + len(rows) * senders[..., None], lands, sizes))
    slots = jnp.arange(len(buffer))[None]
    within = (slots >= lands) & (slots < lands + sizes)  # [group, slot]
    group = jnp.argmax(within, axis=0)
    taken = jnp.take(everything, (begins - lands)[group, 0] + slots[0], axis=0, mode="clip")
    return jnp.where(jnp.any(within, axis=0)[:, None], taken, buffer)
