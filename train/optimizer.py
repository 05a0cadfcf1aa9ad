"""AdamW as PyTorch has it, its learning-rate schedules, and what it keeps in memory, on optax.

Weights are float32 always; what is computed in bfloat16 is cast inside the step (train/step.py).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from qwen_jax.errors import InputError
from train.adapter import is_of_adapter

Moments = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping, decay and a schedule; the defaults are Qwen's (arXiv 2309.16609, section 2.4)."""

    learning_rate: float = 3e-4
    """At the peak."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up: falling along half a cosine or a line, staying, or staying and then falling along a line."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """What is left of the learning rate at the last step (cosine, linear, wsd)."""
    decay_fraction: float = 0.1
    """Share of all steps over which wsd falls."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """On matrices and embeddings, as PyTorch's recipes have it; never on norms and biases."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to at most this global norm."""
    moments: Moments = "float32"
    """Storage of both moments. bfloat16 takes half the memory, int8 a quarter (logarithmic codes)."""
    frozen: tuple[str, ...] = ()
    """Regular expressions; a parameter whose path (such as `layers/mlp/gate/kernel`) one of them finds is not trained,
    and has no gradient and no moments."""

    def __post_init__(self) -> None:
        positive = {"learning_rate": self.learning_rate, "epsilon": self.epsilon}
        if wrong := [name for name, value in positive.items() if not value > 0]:
            raise InputError(f"{wrong[0]} is {positive[wrong[0]]}; it must be above 0.")
        shares = {name: getattr(self, name) for name in ("beta1", "beta2", "final_fraction", "decay_fraction")}
        if wrong := [name for name, value in shares.items() if not 0 <= value <= 1]:
            raise InputError(f"{wrong[0]} is {shares[wrong[0]]}; it must lie between 0 and 1.")
        if self.warmup_steps < 0 or self.weight_decay < 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise InputError(
                "warmup_steps and weight_decay must not be negative, and clip_norm must be above 0 or None."
            )


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ... `total_steps` - 1, as transformers' `get_scheduler` counts them."""
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, total_steps)
    steps = max(total_steps - warmup, 1)
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, last, steps)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, steps, alpha=config.final_fraction)
    else:
        fall = min(round(total_steps * config.decay_fraction), steps)
        main = optax.linear_schedule(peak, last, max(fall, 1), transition_begin=steps - fall)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup]) if warmup else main


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """torch.optim.AdamW after clip_grad_norm_, for the trainable parameters of `split_frozen`."""
    return optax.chain(
        clip_by_global_norm(config.clip_norm) if config.clip_norm is not None else optax.identity(),
        scale_by_adam(config.beta1, config.beta2, config.epsilon, config.moments),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    )


def clip_by_global_norm(clip_norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_, whose denominator is the norm plus 1e-6."""

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        scale = jnp.minimum(1.0, clip_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decays(params: Any) -> Any:
    """True for the leaves of a parameter tree that weight decay acts on."""

    def decays(path: Any, _: Any) -> bool:
        return path_name(path).rpartition("/")[2] not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(decays, params)


# --- frozen parameters ------------------------------------------------------------------------------------------------


def split_frozen(params: Any, patterns: tuple[str, ...]) -> tuple[Any, Any]:
    """(trainable, frozen): the tree twice, each with None for the leaves of the other.

    Raises InputError for a pattern that finds no parameter, or when nothing is left to train.
    """
    paths = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in paths)
        except re.error as error:
            raise InputError(f"frozen: {pattern!r} is not a regular expression ({error}).") from None
        if not found:
            raise InputError(f"frozen: {pattern!r} finds no parameter; paths look like {min(paths)!r}.")

    leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    by_adapter = any(map(is_of_adapter, leaves))  # then nothing else is trained

    def frozen(path: Any) -> bool:
        return (by_adapter and not is_of_adapter(path)) or any(re.search(p, path_name(path)) for p in patterns)

    trainable = jax.tree_util.tree_map_with_path(lambda path, leaf: None if frozen(path) else leaf, params)
    if not jax.tree.leaves(trainable):
        raise InputError("every parameter is frozen, so there is nothing to train; narrow `frozen`.")
    return trainable, jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if frozen(path) else None, params)


def merge_frozen(trainable: Any, frozen: Any) -> Any:
    """The tree that `split_frozen` split."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def path_name(path: Any) -> str:
    """The dict keys on the way to a leaf, joined by "/": a parameter's name, also inside an optimiser's state."""
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


# --- Adam's moments ---------------------------------------------------------------------------------------------------


class AdamState(NamedTuple):
    """Both moments, like the parameters, and the number of updates made."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam(beta1: float, beta2: float, epsilon: float, moments: Moments) -> optax.GradientTransformation:
    """Adam's direction (arXiv 1412.6980, algorithm 1), computed in float32 whatever the moments are stored in."""

    def init(params: Any) -> AdamState:
        count = jnp.zeros((), jnp.int32)

        def zeros(signed: bool) -> Any:
            return jax.tree.map(lambda p: store(jnp.zeros_like(p), moments, signed, count), params)

        return AdamState(count, zeros(True), zeros(False))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamState]:
        count = state.count + 1
        correct1, correct2 = 1 - beta1**count, 1 - beta2**count

        def one(g: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            m = beta1 * load(mu) + (1 - beta1) * g
            v = beta2 * load(nu) + (1 - beta2) * jnp.square(g)
            # the direction from the moments as stored, or XLA:CPU would keep copies of the old ones to compute it from
            m, v = lax.optimization_barrier((m, v))
            direction = (m / correct1) / (jnp.sqrt(v / correct2) + epsilon)
            return direction, store(m, moments, True, count), store(v, moments, False, count)

        leaves, treedef = jax.tree.flatten(updates)
        results = [
            one(*leaf)
            for leaf in zip(leaves, treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu), strict=True)
        ]
        directions, mu, nu = (treedef.unflatten(column) for column in zip(*results, strict=True))
        return directions, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


class Coded(flax.struct.PyTreeNode):
    """Numbers in 8 bits: 0, or sign and logarithm relative to the largest of their row (the last axis).

    Steps are 1/9 of a power of two where there is a sign, else 1/8.
    """

    code: jax.Array  # int8, like the parameter
    scale: jax.Array  # float32 [..., 1]
    signed: bool = flax.struct.field(pytree_node=False)


def store(x: jax.Array, moments: Moments, signed: bool, count: jax.Array) -> Any:
    """A float32 moment in the form it is kept in; `count` is the number of the update, which int8 rounding needs."""
    if moments != "int8":
        return x.astype(moments)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # codes 1..127 for 2^-14..1, or 1..255 for 2^-31.75..1; what is smaller is 0
    top, per_octave = (127, 9) if signed else (255, 8)
    ratio = jnp.abs(x) / jnp.where(scale == 0, 1.0, scale)
    level = jnp.log2(jnp.maximum(ratio, 2.0**-40)) * per_octave + top
    level = jnp.clip(jnp.floor(level + _dither(x.shape, count)), 0, top)
    code = jnp.sign(x) * level if signed else level - 128
    return Coded(code.astype(jnp.int8), scale, signed)


def _dither(shape: tuple[int, ...], count: jax.Array) -> jax.Array:
    """float32 in [0, 1), of which each element sees every fraction equally often as `count` goes on.

    Rounding to the nearest code would keep a moment where it is, because one update changes it by less than a step.
    """
    bits = count.astype(jnp.uint32) * jnp.uint32(2654435769)  # 2^32 / golden ratio, the most even sequence there is
    for axis, factor in enumerate((3242174889, 2447445414)[: len(shape)]):  # the same for two dimensions
        bits = bits + lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1 - axis) * jnp.uint32(factor)
    return (bits >> 8).astype(jnp.float32) / 2**24


def load(stored: Any) -> jax.Array:
    """The float32 moment that `store` kept."""
    if not isinstance(stored, Coded):
        return stored.astype(jnp.float32)
    code = stored.code.astype(jnp.float32)
    top, per_octave = (127, 9) if stored.signed else (255, 8)
    level = jnp.abs(code) if stored.signed else code + 128
    value = jnp.where(level == 0, 0.0, jnp.exp2((level - top) / per_octave)) * stored.scale
    return value * jnp.sign(code) if stored.signed else value
