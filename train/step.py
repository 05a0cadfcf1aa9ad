"""One update of the weights: (state, frozen, batch, signals) -> (state, metrics), pure, for one device or any mesh.

Everything here can be made of shapes alone, which is how `qwen-jax compile` compiles the very step that trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.compiler_options import training_options
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.layers.moe import RouterStats, load_balancing_loss
from qwen_jax.model import Params
from qwen_jax.remat import kept
from train.batch import ArrayOrSpec, TokenBatch, abstract_batch, batch_shardings, micro_batches
from train.objective import Models, Objective, Term
from train.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer, merge_frozen
from train.state import Roles, TrainState, abstract_state, laid_out, shardings

Metrics = dict[str, jax.Array]

# Steps of which the gradient norms are averaged, and after which the average is trusted.
_NORMS, _TRUSTED_AFTER = 100, 20


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step computes; what it computes depends on none of it but for rounding (and `balance`)."""

    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and matrix products; weights, losses and the update are float32."""
    gradient_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the gradients of the layers' matrices, as devices sum and exchange them and as they are kept: bfloat16 halves
    what crosses the wire, as PyTorch's autocast has them; float32 where `compute_dtype` is. Micro-batches add up in
    float32."""
    remat: str = "full"
    """What the backward pass recomputes: from `none`, the most memory, over `minimal`, `dots` and `full` to `offload`,
    the least; or a list of what it does not, see docs/sharding.md."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, which run one after the other."""
    balance: Literal["global-batch", "micro-batch"] = "global-batch"
    """Mixtures of experts: whether experts are to be used evenly over all micro-batches so far, or within each."""
    skip_nonfinite: int = 0
    """Updates, in the whole run, that may be left out because the loss or gradient is not finite or is a spike; the
    next one stops the run."""
    spike: float | None = None
    """A gradient norm above so many times its mean over the last hundred steps is a spike; None sets no limit."""

    def __post_init__(self) -> None:
        kept(self.remat)
        if self.accumulate < 1 or self.skip_nonfinite < 0 or (self.spike is not None and self.spike <= 1):
            raise InputError("accumulate must be at least 1, skip_nonfinite at least 0, and spike above 1 or None.")


class Signals(flax.struct.PyTreeNode):
    """What the processes tell each other with a step, so that all go on or all end after the same one."""

    turn: ArrayOrSpec  # int32: the updates made before this one; a step out of turn changes nothing
    missing: ArrayOrSpec  # int32, of each device: 1 where its process has no batch
    stop: ArrayOrSpec  # int32, of each device: 1 where its process has been asked to stop


def abstract_signals(mesh: Mesh) -> Signals:
    """As jax.ShapeDtypeStruct leaves with shardings."""
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    flags = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=each)
    return Signals(jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec())), flags, flags)


def abstract_arguments(
    model: ModelConfig,
    objective: Objective,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    rows: int,
    length: int,
    params: Mapping[str, Params] | None = None,
) -> tuple[TrainState, Roles, TokenBatch, Signals]:
    """What the step takes, as jax.ShapeDtypeStruct leaves with shardings, for batches [rows, length].

    params: as in `abstract_state`; what is frozen of them stays where it lies.
    """
    state, frozen = abstract_state(model, objective, optimizer, params)
    layout = shardings(model, mesh, frozen) if params is None else jax.tree.map(lambda leaf: leaf.sharding, frozen)
    batch = laid_out(
        abstract_batch(objective.batch, rows, length), batch_shardings(objective.batch, mesh, rows, length)
    )
    return (
        laid_out(state, shardings(model, mesh, state)),
        laid_out(frozen, layout),
        batch,
        abstract_signals(mesh),
    )


def make_train_step(
    model: ModelConfig, objective: Objective, optimizer: OptimizerConfig, step: StepConfig, total_steps: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function of one update; `total_steps` is where the schedule ends.

    A bad step, whose loss or gradient is not finite or whose gradient norm is a spike, changes no weights: it is
    skipped while the policy allows, and counts, or the state comes back as it was. So it does where a process has no
    batch. Metrics are float32 scalars: the means of the objective's terms (the loss in nats), its weights, grad_norm
    (before clipping), learning_rate; good; made, or skipped; how many were skipped; for mixtures balance_loss; with
    signals, missing and stop.
    """
    transformation, schedule = make_optimizer(optimizer, total_steps), learning_rate_schedule(optimizer, total_steps)

    def train_step(
        state: TrainState, frozen: Roles, batch: TokenBatch, signals: Signals | None = None
    ) -> tuple[TrainState, Metrics]:
        guard = state.guard
        assert guard is not None
        made = state.step - guard.skipped
        gradients, loss, terms, weights = _gradients(model, objective, step, state.trainable, frozen, batch)
        norm = optax.tree.norm(gradients)
        metrics = {name: term.mean for name, term in terms.items()} | weights
        metrics |= {"grad_norm": norm, "learning_rate": jnp.asarray(schedule(made), jnp.float32)}
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if step.spike is not None:
            good &= (made < _TRUSTED_AFTER) | (norm <= step.spike * guard.grad_norm)
        in_turn = jnp.ones((), bool)
        if signals is not None:
            metrics |= {"missing": jnp.max(signals.missing), "stop": jnp.max(signals.stop)}
            in_turn = (state.step == signals.turn) & (metrics["missing"] == 0)
        skip = (in_turn & ~good & (guard.skipped < step.skip_nonfinite)).astype(jnp.int32)

        def update() -> TrainState:
            updates, opt_state = transformation.update(gradients, state.opt_state, state.trainable)
            mean = guard.grad_norm + (norm - guard.grad_norm) / jnp.minimum(made + 1, _NORMS)
            return TrainState(
                state.step + 1,
                cast(Roles, optax.apply_updates(state.trainable, updates)),
                opt_state,
                guard.replace(grad_norm=mean),
            )

        def keep() -> TrainState:
            return state.replace(step=state.step + skip, guard=guard.replace(skipped=guard.skipped + skip))

        state = lax.cond(good & in_turn, update, keep)
        assert state.guard is not None
        metrics |= {"good": good, "made": in_turn & (good | (skip > 0)), "skipped": state.guard.skipped}
        return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return train_step


def jit_train_step(
    model: ModelConfig,
    objective: Objective,
    optimizer: OptimizerConfig,
    step: StepConfig,
    total_steps: int,
    mesh: Mesh,
    arguments: tuple[TrainState, Roles, TokenBatch, Signals],
) -> Any:
    """`make_train_step` for `abstract_arguments` on `mesh`, ready to lower.

    The state is donated; its layout is the same before and after. Call it, and lower it, under `jax.set_mesh(mesh)`.
    """
    layouts = jax.tree.map(lambda leaf: leaf.sharding, arguments)
    return jax.jit(
        make_train_step(model, objective, optimizer, step, total_steps),
        in_shardings=layouts,
        out_shardings=(layouts[0], NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=training_options(mesh.devices.flat[0].device_kind),
    )


def make_eval_step(
    model: ModelConfig, objective: Objective, step: StepConfig
) -> Callable[[Roles, Roles, TokenBatch], dict[str, Term]]:
    """The function (trainable, frozen, batch) -> terms, which changes nothing; terms of batches add up."""

    def eval_step(trainable: Roles, frozen: Roles, batch: TokenBatch) -> dict[str, Term]:
        return objective(_models(model, objective, step, trainable, frozen), batch, objective.weights(batch))[1]

    return eval_step


def _models(model: ModelConfig, objective: Objective, step: StepConfig, trainable: Roles, frozen: Roles) -> Models:
    params = merge_frozen(trainable, frozen)
    return Models(model, objective.roles, params, step.compute_dtype, step.gradient_dtype, step.remat)


def _gradients(
    model: ModelConfig, objective: Objective, step: StepConfig, trainable: Roles, frozen: Roles, batch: TokenBatch
) -> tuple[Any, jax.Array, dict[str, Term], dict[str, jax.Array]]:
    """Gradient of the loss of the whole batch, the loss, its terms and its weights."""
    weights = objective.weights(batch)
    parts = micro_batches(batch, step.accumulate)
    non_empty = jnp.sum(jnp.any(parts.segment_ids > 0, axis=(1, 2)), dtype=jnp.float32)

    def loss(trainable: Roles, part: TokenBatch, counts: Any) -> tuple[jax.Array, Any]:
        models = _models(model, objective, step, trainable, frozen)
        total, terms = objective(models, part, weights)
        if model.moe:
            router = jax.tree.map(lambda *stats: sum(stats), *models.routers)
            counts = router if counts is None else jax.tree.map(jnp.add, counts, router)
            balance = load_balancing_loss(router, counts if step.balance == "global-batch" else None)
            terms = terms | {"balance_loss": Term(balance, jnp.any(part.segment_ids > 0).astype(jnp.float32))}
            total += model.moe.aux_loss_coef * balance / jnp.maximum(non_empty, 1)
        return total, (terms, counts)

    def sums_of(part: TokenBatch, counts: Any) -> tuple[tuple[Any, jax.Array, dict[str, Term]], Any]:
        (total, (terms, counts)), gradients = jax.value_and_grad(loss, has_aux=True)(trainable, part, counts)
        return (gradients, total, terms), counts

    def accumulate(carry: Any, part: TokenBatch) -> tuple[Any, None]:
        sums, counts = carry
        more, counts = sums_of(part, counts)
        return (jax.tree.map(jnp.add, sums, more), counts), None

    if step.accumulate == 1:
        sums, _ = sums_of(batch, None)
        return *sums, weights
    counts = None
    if model.moe:
        per_expert = jnp.zeros((model.num_layers, model.moe.num_experts))
        counts = RouterStats(per_expert, per_expert, per_expert[:, 0])
    first = jax.tree.map(lambda array: array[0], parts)
    shapes = jax.eval_shape(lambda part: sums_of(part, counts)[0], first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (sums, _), _ = lax.scan(accumulate, (zeros, counts), parts)
    return *sums, weights
