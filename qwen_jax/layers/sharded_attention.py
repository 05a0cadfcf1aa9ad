"""Attention across a mesh: each device has its rows and heads, and the sequence may be split over `context` as well."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from qwen_jax.kernels.choice import attend, attend_lse
from qwen_jax.kernels.scaled import Held
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.sharding import activation_spec, cache_heads, current_mesh


def repeat_heads(x: jax.Array) -> jax.Array:
    """Keys or values [B, T, K, h] with each head repeated until every `tensor` shard has one."""
    return jnp.repeat(x, cache_heads(x.shape[2]) // x.shape[2], axis=2)


def attention(q: jax.Array, k: Held, v: Held, spec: AttentionSpec) -> jax.Array:
    """softmax(q k^T / sqrt(h)) v with float32 scores; q [B, T, H, h], k and v [B, K, S, h] as caches hold them.

    With `spec.chunk_length`, q is [3, B, T, H, h], see `kernels.plain`. Returns [B, T, H, h] in q's dtype. On a mesh
    every device attends with its own rows, heads and part of the sequence; K is then a multiple of `tensor`.
    """
    mesh = current_mesh()
    return attend(q, k, v, spec) if mesh is None else _sharded(q, k, v, spec, mesh)


def _sharded(q: jax.Array, k: Held, v: Held, spec: AttentionSpec, mesh: AbstractMesh) -> jax.Array:
    """Every device's part of q [(3,) B, T, H, h] and of k, v [B, K, S, h].

    Where `context` splits the sequence, new tokens among themselves exchange heads for sequence (all-to-all, DeepSpeed
    Ulysses, arXiv 2309.14509), which balances the causal triangle; where the heads do not divide, keys and values go
    around a ring (arXiv 2310.01889); and queries of a cache attend to each device's part of it and merge the results.
    """
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    split = context > 1 and k.shape[2] % context == 0
    among_themselves = split and spec.from_beginning and q.shape[-3] == k.shape[2]
    out_shape, sequence = q.shape[-4:], "sequence" if among_themselves else None
    out_spec = activation_spec(mesh, out_shape, "batch", sequence, "heads", None)
    q_spec = PartitionSpec(*[None] * (q.ndim - 4), *out_spec)
    kv_axes = "batch", "kv_heads", "sequence" if split else None
    kv_spec = activation_spec(mesh, k.shape[:3], *kv_axes)  # of scales as well

    # scalars that the compiler may know stay outside, everything else is an argument
    arrays = {f.name: x for f in dataclasses.fields(spec) if isinstance(x := getattr(spec, f.name), jax.Array)}

    def array_spec(name: str, x: jax.Array) -> PartitionSpec:
        rows = out_spec[0] if x.shape[:1] == out_shape[:1] else None
        sequence = out_spec[1] if name.startswith("query") else kv_spec[2]
        return PartitionSpec(*(rows, sequence)[: x.ndim])

    local: Callable[..., jax.Array]
    if not split:
        local = _alone
    elif not among_themselves:
        local = _merged
    else:
        heads, kv_heads = q.shape[-2] // tensor, k.shape[1] // tensor
        exchangeable = heads % context == 0 and (kv_heads % context == 0 or context % kv_heads == 0)
        local = _all_to_all if exchangeable else _ring

    def body(q: jax.Array, k: Held, v: Held, arrays: dict[str, jax.Array]) -> jax.Array:
        return local(q, k, v, spec.replace(**arrays), context)

    in_specs = (q_spec, kv_spec, kv_spec, {name: array_spec(name, x) for name, x in arrays.items()})
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False)(q, k, v, arrays)


def _alone(q: jax.Array, k: Held, v: Held, spec: AttentionSpec, context: int) -> jax.Array:
    return attend(q, k, v, spec)


def _merged(q: jax.Array, k: Held, v: Held, spec: AttentionSpec, context: int) -> jax.Array:
    """All queries against each device's part of the keys."""
    out, lse = attend_lse(q, k, v, spec.replace(key_start=lax.axis_index("context") * k.shape[2]))
    weight = jnp.exp(lse - lax.stop_gradient(lax.pmax(lse, "context")))
    weight = jnp.swapaxes(weight, 1, 2)[..., None]  # [B, T, H, 1]
    return (lax.psum(out * weight, "context") / lax.psum(weight, "context")).astype(q.dtype)


def _all_to_all(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, context: int) -> jax.Array:
    """Each device attends with 1/context of its heads, over the whole sequence."""
    exchange = functools.partial(lax.all_to_all, axis_name="context", tiled=True)
    repeats = max(1, context // k.shape[1])
    k, v = (exchange(jnp.repeat(x, repeats, axis=1), split_axis=1, concat_axis=2) for x in (k, v))
    names = ("query_segments", "query_chunks", "key_segments", "key_chunks")
    parts = {name: x for name in names if (x := getattr(spec, name)) is not None}
    whole = {name: lax.all_gather(x, "context", axis=1, tiled=True) for name, x in parts.items()}
    out = attend(exchange(q, split_axis=q.ndim - 2, concat_axis=q.ndim - 3), k, v, spec.replace(**whole))
    return exchange(out, split_axis=1, concat_axis=2)


def _ring(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, context: int) -> jax.Array:
    """Each device keeps its queries, and the keys and values of all come by in turn."""
    rank, length = lax.axis_index("context"), q.shape[-3]
    to_next = [(i, (i + 1) % context) for i in range(context)]
    keys = (k, v, spec.key_segments, spec.key_chunks)
    out = lse = None
    for step in range(context):
        k, v, segments, chunks = keys
        source = (rank - step) % context
        here = spec.replace(start=rank * length, key_start=source * length, key_segments=segments, key_chunks=chunks)
        part, part_lse = attend_lse(q, k, v, here)
        part, part_lse = part.astype(jnp.float32), jnp.swapaxes(part_lse, 1, 2)[..., None]  # [B, T, H, 1]
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            both = jnp.logaddexp(lse, part_lse)
            out, lse = out * jnp.exp(lse - both) + part * jnp.exp(part_lse - both), both
        if step < context - 1:
            keys = jax.tree.map(lambda x: lax.ppermute(x, "context", to_next), keys)
    assert out is not None
    return out.astype(q.dtype)
