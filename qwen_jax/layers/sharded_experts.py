"""Mixture of experts across a mesh: each device routes its own tokens, and rows travel to the devices of their experts.

No token is dropped. The price is a buffer for the worst case, in which every row of all devices goes to one of them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh

from qwen_jax.backend import current_backend
from qwen_jax.leaves import Leaf, gathered_in_shards, specs
from qwen_jax.sharding import activation_spec

Kernels = tuple[Leaf, ...]

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
        flat = x.reshape(-1, x.shape[-1])
        chosen, weights = chosen.reshape(len(flat), -1), weights.reshape(len(flat), -1)
        if mesh.shape["expert"] == 1:
            y = routed(flat, chosen, weights, kernels)
        else:
            y = _exchanged(expert_mlp, flat, chosen, weights, kernels, mesh.shape["expert"])
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
    expert_mlp: Callable[..., jax.Array],
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: Kernels,
    devices: int,
) -> jax.Array:
    """`routed` where this device holds 1/devices of the experts; x [N, D] are its own tokens."""
    (num_tokens, top_k), held = chosen.shape, kernels[0].shape[0]  # held: experts of this device
    room = num_tokens * min(top_k, held)  # rows that one device may send to another
    me = lax.axis_index("expert")

    order = jnp.argsort(chosen.reshape(-1), stable=True)  # rows by expert, so by device
    rows = jnp.take(x, order // top_k, axis=0)  # [N k, D]
    sizes = jnp.bincount(chosen.reshape(-1), length=devices * held).reshape(devices, held)
    sizes = lax.all_gather(sizes, "expert")  # [from, to, expert there]
    sent = jnp.sum(sizes, axis=-1)  # [from, to]
    starts = jnp.cumsum(sent, axis=-1) - sent  # of the rows for `to` among those of `from`

    received = _send(rows, starts[me], sent, room)  # [from * room, D], each device's rows at the start of its room
    ends = jnp.cumsum(sizes[:, me], axis=-1)  # [from, expert]
    expert = jnp.sum(jnp.arange(room)[None, :, None] >= ends[:, None, :], axis=-1)  # [from, room], `held`: no row
    by_expert = jnp.argsort(expert.reshape(-1), stable=True)
    out = expert_mlp(jnp.take(received, by_expert, axis=0), jnp.sum(sizes[:, me], axis=0), kernels).astype(x.dtype)
    out = jnp.zeros_like(out).at[by_expert].set(out)

    returned = _return(out, starts, sent, room, len(rows))  # in the order of `rows`
    out = jnp.zeros_like(returned).at[order].set(returned).reshape(num_tokens, top_k, -1)
    return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)[..., None], axis=1)


def _send(rows: jax.Array, starts: jax.Array, sent: jax.Array, room: int) -> jax.Array:
    """rows [R, D], those for device d from starts[d] on -> [devices * room, D], those of device d from d * room on."""
    devices, me = len(starts), lax.axis_index("expert")
    if current_backend().ragged_exchange:
        buffer = jnp.zeros((devices * room, rows.shape[1]), rows.dtype)
        theirs = jnp.full(devices, me * room)
        return lax.ragged_all_to_all(rows, buffer, starts, sent[me], theirs, sent[:, me], axis_name="expert")
    # the whole rooms travel
    slots = starts[:, None] + jnp.arange(room)[None]  # [to, room]
    filled = jnp.arange(room)[None] < sent[me][:, None]
    parts = jnp.where(filled[..., None], jnp.take(rows, slots, axis=0, mode="clip"), 0)
    return lax.all_to_all(parts, "expert", 0, 0).reshape(devices * room, -1)


def _return(rows: jax.Array, starts: jax.Array, sent: jax.Array, room: int, num_rows: int) -> jax.Array:
    """The way back of `_send`: what each device computed of our rows, in the order in which we sent them [R, D]."""
    devices, me = len(starts), lax.axis_index("expert")
    if current_backend().ragged_exchange:
        buffer = jnp.zeros((num_rows, rows.shape[1]), rows.dtype)
        ours = jnp.arange(devices) * room
        return lax.ragged_all_to_all(rows, buffer, ours, sent[:, me], starts[:, me], sent[me], axis_name="expert")
    parts = lax.all_to_all(rows.reshape(devices, room, -1), "expert", 0, 0).reshape(devices * room, -1)
    index = jnp.arange(num_rows)
    device = jnp.sum(index[:, None] >= (starts[me] + sent[me])[None], axis=-1)
    return jnp.take(parts, device * room + index - starts[me][device], axis=0)
