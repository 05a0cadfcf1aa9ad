"""A new objective is one file: this one pulls tokens by advantages, near a frozen reference, and no line of the loop,
the step or the checkpoints knows of it. Its source makes batches with the policy, which is never a step stale."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.sharding import MeshConfig, make_mesh
from tests.train.tiny import CONFIG, packed_batch, parameters
from train.batch import TokenBatch, channel
from train.data.feed import Feed
from train.loop import Hook, Step, Supply, loop
from train.objective import Models, Objective, Role, Term
from train.optimizer import OptimizerConfig
from train.state import new_state, split
from train.step import StepConfig, abstract_arguments, jit_train_step, make_train_step
from train.watch import Watch

# --- the objective: a file of its own in train/objectives/ ------------------------------------------------------------


class PulledBatch(TokenBatch):
    advantages: jax.Array = channel(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Pulled(Objective):
    """-advantage * log p(token) plus beta * (log p - log p of the reference)^2, mean over tokens."""

    beta: float = 0.1
    temperature: float = 0.7
    batch: ClassVar = PulledBatch
    roles: ClassVar = {"policy": Role(), "reference": Role(trainable=False)}

    def weights(self, batch):
        return {"tokens": jnp.sum(batch.loss_mask)}

    def __call__(self, models: Models, batch, weights):
        policy = models.logprobs("policy", batch, self.temperature)
        apart = jnp.square(policy - models.logprobs("reference", batch, self.temperature))
        each = batch.loss_mask * (self.beta * apart - batch.advantages * policy)
        here = jnp.sum(batch.loss_mask)
        terms = {"loss": Term(jnp.sum(each), here), "apart": Term(jnp.sum(batch.loss_mask * apart), here)}
        return jnp.sum(each) / jnp.maximum(weights["tokens"], 1), terms


# --- what holds for it ------------------------------------------------------------------------------------------------
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0, clip_norm=None, weight_decay=0.0)
STEP = StepConfig(compute_dtype="float32", remat="none")
ROWS, LENGTH = 4, 16


def roles():
    return {"policy": parameters(CONFIG, 0), "reference": parameters(CONFIG, 1)}


def pulled_batch(seed: int = 0) -> PulledBatch:
    batch = packed_batch(ROWS, LENGTH, seed)
    advantages = np.random.default_rng(seed).standard_normal((ROWS, LENGTH)).astype(np.float32)
    return PulledBatch(**vars(batch), advantages=advantages)


def by_hand(params, batch: PulledBatch, objective: Pulled):
    """The loss with whole logits."""
    from qwen_jax.model import Inputs, forward, unembed

    def logprobs(tree):
        inputs = Inputs.training(batch.tokens, segment_ids=batch.segment_ids, rotary_positions=batch.positions)
        hidden = forward(CONFIG, tree, inputs).hidden
        logits = unembed(CONFIG, tree, hidden) / objective.temperature
        return jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]

    policy = logprobs(params["policy"])
    apart = jnp.square(policy - logprobs(params["reference"]))
    each = batch.loss_mask * (objective.beta * apart - batch.advantages * policy)
    return jnp.sum(each) / jnp.sum(batch.loss_mask)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_its_loss_and_gradients_are_those_of_the_formula(accumulate):
    objective, batch = Pulled(), pulled_batch()
    expected, gradients = jax.jit(jax.value_and_grad(lambda *given: by_hand(*given, objective)))(roles(), batch)
    trainable, frozen = split(objective, OPTIMIZER, roles())
    assert not jax.tree.leaves(trainable["reference"]) and not jax.tree.leaves(frozen["policy"])
    frozen["reference"] = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen["reference"])
    step = make_train_step(CONFIG, objective, OPTIMIZER, dataclasses.replace(STEP, accumulate=accumulate), 10)
    state, metrics = jax.jit(step)(new_state(trainable, OPTIMIZER), frozen, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(state.opt_state[1].mu["policy"]), jax.tree.leaves(gradients["policy"]), strict=True
    ):
        np.testing.assert_allclose(ours / 0.1, theirs, atol=1e-5 * max(1e-2, float(jnp.max(jnp.abs(theirs)))))


class FromThePolicy:
    """Batches that depend on the weights that make them."""

    def __init__(self, end: int | None = None) -> None:
        self.seen: list[tuple[int, np.ndarray]] = []
        self._end = end

    def next(self, step, policy):
        self.seen.append((step, np.array(policy["policy"]["final_norm"]["scale"])))
        return None if step == self._end else vars(pulled_batch(step))

    def get_state(self):
        return len(self.seen)

    def set_state(self, state): ...

    def metrics(self):
        return {}


class Remember(Hook):
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.scales: list[np.ndarray] = []

    def after(self, step: Step) -> bool:
        self.steps.append(step)
        self.scales.append(np.array(step.state.trainable["policy"]["final_norm"]["scale"]))
        return False


@pytest.mark.parametrize("end", [None, 3], ids=["steps", "data"])
def test_the_loop_gives_the_source_the_newest_policy(end):
    objective, mesh = Pulled(), make_mesh(MeshConfig(), jax.devices()[:1])
    arguments = abstract_arguments(CONFIG, objective, OPTIMIZER, mesh, ROWS, LENGTH)
    trainable, frozen = split(objective, OPTIMIZER, roles())
    source, remember = FromThePolicy(end), Remember()
    with jax.set_mesh(mesh), Watch(60, print) as watch:
        step = jit_train_step(CONFIG, objective, OPTIMIZER, STEP, 5, mesh, arguments)
        supply = Supply(source, Feed(objective.batch, mesh, ROWS, LENGTH), lambda: None)
        state, last = loop(
            lambda state, batch, signals: step(state, frozen, batch, signals),
            new_state(jax.tree.map(jnp.array, trainable), OPTIMIZER), supply, [remember], watch, mesh, 5,
        )  # fmt: skip
    made = end or 5
    assert int(state.step) == made == len(remember.steps) and last.metrics["made"] == (end is None)
    assert [step for step, _ in source.seen] == list(range(made + (end is not None)))
    for (_, given), after in zip(source.seen[1:], remember.scales, strict=False):
        np.testing.assert_array_equal(given, after)
    assert [step.taken.place for step in remember.steps] == list(range(1, made + 1))
