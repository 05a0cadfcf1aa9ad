"""Where everything lies on a mesh: five mesh axes, and one table of rules from logical axes to them.

A program is sharded by running it under `jax.set_mesh(mesh)` with its arguments laid out by the shardings given here;
inside, the layers name the axes of their activations with `constrain`. Without a mesh all of this does nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError

AXES = ("data", "fsdp", "tensor", "context", "expert")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which is all devices that the others leave.

    The default, with no size given, is the mesh that `auto` makes of the model and the devices.
    """

    data: int = 1
    """copies of the model, each with its part of the batch"""
    fsdp: int = -1
    """parts of the batch and of every parameter and optimiser state (ZeRO-3)"""
    tensor: int = 1
    """parts of every layer's heads and features, and of the vocabulary; between layers, of the sequence"""
    context: int = 1
    """parts of the sequence, attention included"""
    expert: int = 1
    """parts of the batch, and of the experts of a mixture"""

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """The five sizes on `num_devices` devices. Raises InputError if they do not multiply to that."""
        sizes = [getattr(self, axis) for axis in AXES]
        said = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size != 1) or "all axes 1"
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise InputError(f"a mesh of {said} is impossible: sizes are at least 1, and one of them may be -1.")
        fixed = math.prod(size for size in sizes if size != -1)
        if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
            raise InputError(
                f"a mesh of {said} needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices, "
                f"but there are {num_devices}; change the sizes, or set one of them to -1 to take what is left."
            )
        return tuple(num_devices // fixed if size == -1 else size for size in sizes)

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """From text such as "fsdp=32,tensor=4"; axes that are not named are 1. Raises InputError."""
        sizes = {axis: 1 for axis in AXES}
        for part in text.split(","):
            axis, equals, size = (piece.strip() for piece in part.partition("="))
            if axis not in AXES or not equals or not size.lstrip("-").isdigit():
                raise InputError(
                    f"{part!r} is no size of a mesh axis; write for example fsdp=4,tensor=2, the axes being "
                    f"{', '.join(AXES)}."
                )
            sizes[axis] = int(size)
        return cls(**sizes)

    @classmethod
    def auto(cls, config: ModelConfig, num_devices: int, num_slices: int = 1) -> MeshConfig:
        """A mesh to begin with: experts over up to 8 devices, FSDP over up to 32, then tensor, then data.

        One FSDP axis over a whole 3-D torus of 64 chips or more turns its gathers into all-reduces (docs/tpu.md). Of
        several slices each is cut so, with a copy of the model.
        """
        in_slice = num_devices // num_slices
        expert = math.gcd(config.moe.num_experts, in_slice, 8) if config.moe else 1
        rest = in_slice // expert
        fsdp = math.gcd(rest, 32)
        tensor = max(t for t in divisors(rest // fsdp) if t <= 8 and not _tensor_problem(config, t))
        return cls(data=num_slices * rest // fsdp // tensor, fsdp=fsdp, tensor=tensor, expert=expert)

    def for_model(self, config: ModelConfig, num_devices: int, num_slices: int = 1) -> MeshConfig:
        """This mesh, or, where no size is given, that of `auto`."""
        return MeshConfig.auto(config, num_devices, num_slices) if self == MeshConfig() else self


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes it is split over. No array may have two axes split over the same mesh axis."""

    # parameters
    layers: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp", "context", "expert")
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)  # whole on every shard where there are fewer of them than shards
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)
    expert_embed: tuple[str, ...] = ("fsdp", "context")
    expert_mlp: tuple[str, ...] = ("tensor",)
    norm: tuple[str, ...] = ()
    shared_gate: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    # activations
    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    sequence: tuple[str, ...] = ("context",)
    residual: tuple[str, ...] = ("context", "tensor")  # the sequence between layers, where nothing else is split

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes. Raises InputError on a name unknown or a collision."""
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := [axis for axis in axes if axis is not None and axis not in known]:
            raise InputError(f"there is no rule for the logical axis {unknown[0]!r}; add it to sharding.Rules.")
        split = [getattr(self, axis) if axis else () for axis in axes]
        used = [mesh_axis for mesh_axes in split for mesh_axis in mesh_axes]
        if twice := [axis for axis in used if used.count(axis) > 1]:
            raise InputError(
                f"an array with axes {tuple(axes)} would be split over the mesh axis {twice[0]!r} twice; "
                "change one of the two rules in sharding.Rules."
            )
        return PartitionSpec(*split)


RULES = Rules()
# Parameters are whole along these when a layer computes with them.
GATHERED = ("embed", "expert_embed")


# --- the mesh ---------------------------------------------------------------------------------------------------------


def make_mesh(
    mesh_config: MeshConfig, devices: Sequence[Any] | None = None, *, model: ModelConfig | None = None
) -> Mesh:
    """A mesh with all five axes over `devices` (default: all of every process), neighbours on the torus side by side.

    Several TPU slices lie along `data`. Raises InputError if the sizes do not fit the devices, their slices or, given
    one, the model; without one, the default sizes are all devices along `fsdp`.
    """
    devices = jax.devices() if devices is None else devices
    # what TPUs of different slices send each other goes through the data centre's network
    num_slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if model is not None:
        mesh_config = mesh_config.for_model(model, len(devices), num_slices)
    sizes = mesh_config.sizes(len(devices))
    if model is not None:
        check_divides(model, dict(zip(AXES, sizes, strict=True)))
    said = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size != 1) or "all axes 1"
    if sizes[0] % num_slices:
        raise InputError(
            f"a mesh of {said} does not lie on {num_slices} slices: only gradients may cross from one to another, so "
            f"data must be a multiple of {num_slices}."
        )
    across = (num_slices, *[1] * (len(sizes) - 1))
    within = (sizes[0] // num_slices, *sizes[1:])
    try:
        if num_slices > 1:
            grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as error:
        raise InputError(
            f"a mesh of {said} does not lie on this topology ({str(error).splitlines()[0]}); use sizes that are "
            "products of the topology's own dimensions."
        ) from error
    return Mesh(grid, AXES)


def check_divides(config: ModelConfig, sizes: dict[str, int]) -> None:
    """Raises InputError if the model cannot be cut into these mesh axis sizes, naming sizes that would work."""
    tensor, expert = sizes["tensor"], sizes["expert"]
    if problem := _tensor_problem(config, tensor):
        works = [t for t in range(1, 129) if not _tensor_problem(config, t)]
        raise InputError(f"tensor={tensor} does not divide this model's {problem}; these do: {_listed(works)}.")
    if expert > 1 and not config.moe:
        raise InputError(f"expert={expert} needs a mixture of experts, and this model is dense; use fsdp or data.")
    if config.moe and config.moe.num_experts % expert:
        works = divisors(config.moe.num_experts)
        raise InputError(
            f"expert={expert} does not divide this model's {config.moe.num_experts} experts; "
            f"these do: {_listed(works)}."
        )
    parts = math.prod(sizes[axis] for axis in RULES.embed)
    if config.hidden_size % parts:
        raise InputError(
            f"{' x '.join(RULES.embed)} = {parts} does not divide this model's width of {config.hidden_size}; "
            f"products that do: {_listed(divisors(config.hidden_size))}."
        )


def _tensor_problem(config: ModelConfig, tensor: int) -> str | None:
    """What of the model cannot be cut into `tensor` parts."""
    if config.num_heads % tensor:
        return f"{config.num_heads} attention heads"
    if config.num_kv_heads % tensor and tensor % config.num_kv_heads:
        return f"{config.num_kv_heads} key/value heads, nor is it a multiple of them"
    if config.vocab_size % tensor:
        return f"vocabulary of {config.vocab_size} rows"
    widths = {"feed-forward width": 0 if config.moe else config.intermediate_size}
    if config.moe:
        widths |= {
            "expert width": config.moe.expert_intermediate_size,
            "shared expert's width": config.moe.shared_intermediate_size,
        }
    return next((f"{name} of {width}" for name, width in widths.items() if width % tensor), None)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")


# --- parameters, caches, batches --------------------------------------------------------------------------------------


def shardings(axes: Any, tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A NamedSharding for each leaf of `tree`, from a like tree of PartitionSpecs of logical names."""

    def sharding(logical: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names: list[Any] = list(logical) + [None] * (len(leaf.shape) - len(logical))
        if "kv_heads" in names and leaf.shape[names.index("kv_heads")] % mesh.shape["tensor"]:
            names[names.index("kv_heads")] = None
        return NamedSharding(mesh, rules.spec(names))

    return jax.tree.map(sharding, axes, tree, is_leaf=lambda node: isinstance(node, PartitionSpec))


def activation_sharding(mesh: Mesh, shape: Sequence[int], *axes: str | None) -> NamedSharding:
    """How an activation, batch or cache of `shape` with these logical axes lies on `mesh`, see `constrain`."""
    return NamedSharding(mesh, activation_spec(mesh, shape, *axes))


def cache_heads(num_kv_heads: int) -> int:
    """Key/value heads that attention and caches hold on the current mesh: so many that every tensor shard has one."""
    mesh = current_mesh()
    return num_kv_heads if mesh is None else max(num_kv_heads, mesh.shape["tensor"])


def activation_spec(mesh: Mesh | AbstractMesh, shape: Sequence[int], *axes: str | None) -> PartitionSpec:
    """An activation is split over as many of its rule's mesh axes, in order, as divide it: one token over none."""
    RULES.spec(axes)  # refuses unknown names and collisions
    kept = []
    for size, name in zip(shape, axes, strict=True):
        split: tuple[str, ...] = ()
        for axis in getattr(RULES, name) if name else ():
            if mesh.shape[axis] > 1 and size % math.prod(mesh.shape[a] for a in (*split, axis)) == 0:
                split += (axis,)
        kept.append(split or None)
    return PartitionSpec(*kept)


# --- inside a program -------------------------------------------------------------------------------------------------


def current_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` around the running trace, or None where there is none with our axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or set(AXES) - set(mesh.axis_names) or mesh.size == 1 else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out on the current mesh by the logical names of its axes; None leaves an axis whole."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, activation_spec(mesh, x.shape, *axes))


def gathered(param: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """A parameter as a layer computes with it: whole along the width that FSDP splits. Its gradient leaves split."""
    mesh = current_mesh()
    if mesh is None:
        return param
    parts = activation_spec(mesh, param.shape, *axes)
    whole = activation_spec(mesh, param.shape, *(None if axis in GATHERED else axis for axis in axes))
    if whole == parts:
        return param

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x, whole)

    def scatter(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
        # first over one axis, then over all: asked for all at once, XLA gathers the activations of every device
        first = (kept if kept == part else jax.tree.leaves(part)[0] for part, kept in zip(parts, whole, strict=True))
        cotangent = lax.with_sharding_constraint(cotangent, PartitionSpec(*first))
        return (lax.with_sharding_constraint(cotangent, parts),)

    # a constraint's own gradient would be gathered as well: an all-reduce where a reduce-scatter is enough
    gather.defvjp(lambda x: (gather(x), None), scatter)
    return gather(param)


# --- inside a shard_map -----------------------------------------------------------------------------------------------


# Side of a square of chips without a ring, over which XLA:TPU sums whole arrays, but along a side their parts.
SQUARE = 4


def scatter_sum(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """The sum of `x` over a mesh axis, of which each device keeps its part along `dimension`."""
    if lax.axis_size(axis) != SQUARE**2:
        return lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    columns = [[row * SQUARE + column for row in range(SQUARE)] for column in range(SQUARE)]
    rows = [[row * SQUARE + column for column in range(SQUARE)] for row in range(SQUARE)]
    for groups in (columns, rows):
        x = lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True, axis_index_groups=groups)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_parts(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """The parts of all devices of a mesh axis, one after the other along `dimension`; gradients by `scatter_sum`."""
    return lax.all_gather(x, axis, axis=dimension, tiled=True)


gather_parts.defvjp(
    lambda x, axis, dimension: (gather_parts(x, axis, dimension), None),
    lambda axis, dimension, _, cotangent: (scatter_sum(cotangent, axis, dimension),),
)
