"""What a run changes, what it only reads, and how both lie on a mesh; made of shapes alone where that is enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.model import Params, abstract, init, param_shardings
from train.objective import Objective
from train.optimizer import OptimizerConfig, make_optimizer, path_name, split_frozen

Roles = dict[str, Params]
"""Role -> parameter tree, with None for the leaves that are not there."""


class Guard(flax.struct.PyTreeNode):
    """What tells a bad step from a good one."""

    skipped: jax.Array  # int32, updates not made because the loss or gradient was not finite or far too large
    grad_norm: jax.Array  # float32, mean of the last hundred or so


class TrainState(flax.struct.PyTreeNode):
    """All that an update changes."""

    step: jax.Array  # int32, batches learned or skipped
    trainable: Roles  # float32
    opt_state: optax.OptState
    guard: Guard | None = None


def new_guard() -> Guard:
    return Guard(jnp.zeros((), jnp.int32), jnp.zeros(()))


def split(objective: Objective, optimizer: OptimizerConfig, params: Mapping[str, Params]) -> tuple[Roles, Roles]:
    """(trainable, frozen) leaves of every role, each tree with None for the leaves of the other.

    Raises InputError when a pattern of `optimizer.frozen` finds nothing, or nothing is left to train.
    """
    trainable: Roles = {}
    frozen: Roles = {}
    for role, tree in params.items():
        if objective.roles[role].trainable:
            trainable[role], frozen[role] = split_frozen(tree, optimizer.frozen)
        else:
            trainable[role], frozen[role] = jax.tree.map(lambda _: None, tree), tree
    return trainable, frozen


def new_state(trainable: Roles, optimizer: OptimizerConfig) -> TrainState:
    """The state before the first update of these parameters."""
    opt_state = make_optimizer(optimizer, 1).init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, opt_state, new_guard())


def init_roles(model: ModelConfig, objective: Objective, key: jax.Array) -> Roles:
    """Random float32 parameters, the same for every role."""
    return dict.fromkeys(objective.roles, init(model, key))


def abstract_state(
    model: ModelConfig, objective: Objective, optimizer: OptimizerConfig, params: Mapping[str, Params] | None = None
) -> tuple[TrainState, Roles]:
    """The state and the frozen leaves as jax.ShapeDtypeStruct leaves; nothing is computed.

    params: of every role, or their shapes, where they are not the model's own float32 ones.
    """
    roles = params or dict.fromkeys(objective.roles, abstract(model))
    trainable, frozen = split(objective, optimizer, roles)
    return jax.eval_shape(lambda trainable: new_state(trainable, optimizer), trainable), frozen


def shardings(model: ModelConfig, mesh: Mesh, tree: Any) -> Any:
    """Of a state or frozen leaves, each leaf's NamedSharding: moments lie where their parameters lie, counts
    everywhere."""
    of_params = jax.tree_util.tree_leaves_with_path(param_shardings(model, mesh))
    of_params = {path_name(path): sharding for path, sharding in of_params}
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(model))}

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path).partition("/")[2]  # without the role
        if name not in of_params or len(leaf.shape) != len(shapes[name]):  # a factor of an adapter is everywhere
            return NamedSharding(mesh, PartitionSpec())
        axes = [*of_params[name].spec] + [None] * (len(shapes[name]) - len(of_params[name].spec))
        # an 8-bit moment's scales have one number for each row of the parameter
        same = zip(axes, leaf.shape, shapes[name], strict=True)
        return NamedSharding(mesh, PartitionSpec(*(axis if size == whole else None for axis, size, whole in same)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def laid_out(shapes: Any, layout: Any) -> Any:
    """The shapes with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, layout
    )
