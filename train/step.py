"""One update of the weights: (state, batch) -> (state, metrics), pure, for one device or any mesh.

A batch is a dict of arrays [B, T]: tokens, targets, positions and segment_ids (0 is padding) int32, loss_mask float32.
Everything here can be made of shapes alone, which is how `qwen-jax compile` compiles the very step that trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.layers.moe import RouterStats
from qwen_jax.model import Inputs, Params, Remat, abstract, forward, init, param_shardings
from qwen_jax.sharding import activation_sharding, constrain
from train.loss import LossSums, balance_loss, cross_entropy
from train.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
    merge_frozen,
    path_name,
    split_frozen,
)

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "loss_mask": jnp.float32,
}


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step computes; what it computes depends on none of it but for rounding (and `balance`)."""

    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and matrix products; weights, gradient sums, losses and the update are float32."""
    remat: Remat = "full"
    """What the backward pass recomputes: from `none`, the most memory, to `full` and `offload`, the least."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, which run one after the other."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the logits; 1e-4 where it is used."""
    balance: Literal["global-batch", "micro-batch"] = "global-batch"
    """Mixtures of experts: whether experts are to be used evenly over all micro-batches so far, or within each."""


class TrainState(flax.struct.PyTreeNode):
    """All that an update changes."""

    step: jax.Array  # int32, updates made
    params: Params  # float32
    opt_state: optax.OptState  # of the trainable parameters


# --- the state and its layout -----------------------------------------------------------------------------------------


def new_state(params: Params, optimizer: OptimizerConfig) -> TrainState:
    """The state before the first update of these parameters."""
    trainable, _ = split_frozen(params, optimizer.frozen)
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(optimizer, 1).init(trainable))


def init_state(model: ModelConfig, optimizer: OptimizerConfig, key: jax.Array) -> TrainState:
    """A state with random parameters."""
    return new_state(init(model, key), optimizer)


def abstract_state(model: ModelConfig, optimizer: OptimizerConfig) -> TrainState:
    """The state as jax.ShapeDtypeStruct leaves; nothing is computed."""
    return jax.eval_shape(lambda params: new_state(params, optimizer), abstract(model))


def state_shardings(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """The state with each leaf's NamedSharding: moments lie where their parameters lie, counts everywhere."""
    of_params = jax.tree_util.tree_leaves_with_path(param_shardings(model, mesh))
    of_params = {path_name(path): sharding for path, sharding in of_params}
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(model))}

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        if name not in of_params:
            return NamedSharding(mesh, PartitionSpec())
        axes = [*of_params[name].spec] + [None] * (len(shapes[name]) - len(of_params[name].spec))
        # an 8-bit moment's scales have one number for each row of the parameter
        same = zip(axes, leaf.shape, shapes[name], strict=True)
        return NamedSharding(mesh, PartitionSpec(*(axis if size == whole else None for axis, size, whole in same)))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state(model, optimizer))


def abstract_batch(batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `batch_size` rows of `length` tokens as jax.ShapeDtypeStruct leaves."""
    return {name: jax.ShapeDtypeStruct((batch_size, length), dtype) for name, dtype in BATCH_DTYPES.items()}


def batch_shardings(mesh: Mesh, batch_size: int, length: int) -> dict[str, NamedSharding]:
    """How a batch lies on the mesh: rows over data, fsdp and expert, the sequence over context."""
    sharding = activation_sharding(mesh, (batch_size, length), "batch", "sequence")
    return dict.fromkeys(BATCH_DTYPES, sharding)


# --- the step ---------------------------------------------------------------------------------------------------------


def make_train_step(
    model: ModelConfig, optimizer: OptimizerConfig, step: StepConfig, total_steps: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function of one update; `total_steps` is where the schedule ends.

    The loss is the mean over all tokens that count, of all micro-batches and shards together. An update whose loss or
    gradient is not finite is not made: the state comes back as it was. Metrics are float32 scalars: loss (nats per
    token), accuracy, tokens, grad_norm (before clipping), learning_rate, finite, and, where they exist, z_loss and
    balance_loss.
    """
    transformation, schedule = make_optimizer(optimizer, total_steps), learning_rate_schedule(optimizer, total_steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = split_frozen(state.params, optimizer.frozen)
        gradients, sums, balance = _gradients(model, step, trainable, frozen, batch)
        metrics = token_means(sums) | {
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        if step.z_loss:
            metrics["z_loss"] = (sums.loss - sums.cross_entropy) / jnp.maximum(sums.tokens, 1)
        if model.moe:
            metrics["balance_loss"] = balance
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(balance) & jnp.isfinite(metrics["grad_norm"])

        def update() -> TrainState:
            updates, opt_state = transformation.update(gradients, state.opt_state, trainable)
            params = merge_frozen(optax.apply_updates(trainable, updates), frozen)
            return TrainState(state.step + 1, params, opt_state)

        state = lax.cond(finite, update, lambda: state)
        return state, metrics | {"finite": finite.astype(jnp.float32)}

    return train_step


def jit_train_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    step: StepConfig,
    total_steps: int,
    mesh: Mesh,
    batch_size: int,
    length: int,
) -> Any:
    """`make_train_step` for batches [batch_size, length] on `mesh`, ready to lower.

    The state is donated; its layout is the same before and after. Call it, and lower it, under `jax.set_mesh(mesh)`.
    """
    state = state_shardings(model, optimizer, mesh)
    return jax.jit(
        make_train_step(model, optimizer, step, total_steps),
        in_shardings=(state, batch_shardings(mesh, batch_size, length)),
        out_shardings=(state, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def make_eval_step(model: ModelConfig, step: StepConfig) -> Callable[[Params, Batch], LossSums]:
    """The function that sums the loss of a batch without changing anything; sums of batches add up."""

    def eval_step(params: Params, batch: Batch) -> LossSums:
        return _loss_sums(model, step, params, batch)[0]

    return eval_step


def token_means(sums: LossSums) -> Metrics:
    """Means over the tokens that count."""
    tokens = jnp.maximum(sums.tokens, 1)
    return {"loss": sums.cross_entropy / tokens, "accuracy": sums.correct / tokens, "tokens": sums.tokens}


def _loss_sums(model: ModelConfig, step: StepConfig, params: Params, batch: Batch) -> tuple[LossSums, Any]:
    params = _cast_layers(params, step.compute_dtype)
    out = forward(
        model,
        params,
        Inputs.training(batch["tokens"], segment_ids=batch["segment_ids"], rotary_positions=batch["positions"]),
        dtype=step.compute_dtype,
        remat=step.remat,
    )
    head = params["embed" if model.tie_word_embeddings else "lm_head"]["embedding"]
    return cross_entropy(out.hidden, head, batch["targets"], batch["loss_mask"], z_loss=step.z_loss), out.router


def _cast_layers(params: Params, dtype: str) -> Params:
    """Matrices of the layers in the compute dtype, so that FSDP gathers those bytes only.

    Norms and biases are cast where they are used, if at all, and so are the embedding and the head, whose gradients are
    thereby summed in float32.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if path[-1].key in ("scale", "bias") else leaf.astype(dtype)

    return params | {"layers": jax.tree_util.tree_map_with_path(cast, params["layers"])}


def _gradients(
    model: ModelConfig, step: StepConfig, trainable: Any, frozen: Any, batch: Batch
) -> tuple[Any, LossSums, jax.Array]:
    """Gradient of the mean loss over the whole batch, its sums, and the mean load-balancing loss."""
    num_tokens = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)
    micro_batches = {name: _micro_batches(array, step.accumulate) for name, array in batch.items()}
    non_empty = jnp.maximum(jnp.sum(jnp.any(micro_batches["segment_ids"] > 0, axis=(1, 2))), 1)

    def loss(trainable: Any, micro_batch: Batch, counts: Any) -> tuple[jax.Array, Any]:
        sums, router = _loss_sums(model, step, merge_frozen(trainable, frozen), micro_batch)
        total, balance = sums.loss / num_tokens, jnp.zeros(())
        if model.moe:
            counts = router if counts is None else jax.tree.map(jnp.add, counts, router)
            balance = balance_loss(router, counts if step.balance == "global-batch" else None) / non_empty
            total += model.moe.aux_loss_coef * balance
        return total, (sums, balance, counts)

    gradient = jax.grad(loss, has_aux=True)
    if step.accumulate == 1:
        gradients, (sums, balance, _) = gradient(trainable, batch, None)
        return gradients, sums, balance

    def accumulate(carry: Any, micro_batch: Batch) -> tuple[Any, None]:
        *totals, counts = carry
        gradients, (sums, balance, counts) = gradient(trainable, micro_batch, counts)
        return (*jax.tree.map(jnp.add, totals, [gradients, sums, balance]), counts), None

    counts = None
    if model.moe:
        per_expert = jnp.zeros((model.num_layers, model.moe.num_experts))
        counts = RouterStats(per_expert, per_expert, per_expert[:, 0])
    zeros = (jax.tree.map(jnp.zeros_like, trainable), LossSums(*jnp.zeros(4)), jnp.zeros(()), counts)
    (gradients, sums, balance, _), _ = lax.scan(accumulate, zeros, micro_batches)
    return gradients, sums, balance


def _micro_batches(x: jax.Array, count: int) -> jax.Array:
    """[B, T] -> [count, B / count, T], every micro-batch with rows of every shard."""
    if x.shape[0] % count:
        raise InputError(f"a batch of {x.shape[0]} rows cannot be cut into {count} micro-batches; use a divisor.")
    x = x.reshape(-1, count, x.shape[1]).swapaxes(0, 1)
    return constrain(x, None, "batch", "sequence")
