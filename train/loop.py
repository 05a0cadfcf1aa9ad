"""The loop, and what hangs on it: where batches come from, and hooks that are called after every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.errors import EnvironmentFailed, Failure
from train.data.feed import Feed
from train.state import Roles, TrainState
from train.step import Signals, abstract_signals
from train.watch import Watch

Rows = Mapping[str, np.ndarray]


class Source(Protocol):
    """Where batches come from. Files ignore the policy; rollouts are made with it."""

    def next(self, step: int, policy: Roles) -> Rows | None:
        """This process's rows of the batch of update `step` + 1, made with the weights after update `step`; None at the
        end, which all processes should reach together."""
        ...

    def get_state(self) -> Any:
        """The place after the last batch, as JSON, the same on all processes."""
        ...

    def set_state(self, state: Any) -> None: ...

    def metrics(self) -> dict[str, float]:
        """What is to be recorded of the batches so far."""
        ...


@dataclasses.dataclass(frozen=True)
class Taken:
    """A batch on its way to the step."""

    batch: Any  # on the devices
    rows: Rows | None  # None where there was none
    place: Any  # in the source, after it


class Supply:
    """Batches of a source on the devices, one ahead of the step. It never raises: where one process fails or ends, the
    step tells all, and `failure` says why."""

    def __init__(self, source: Source, feed: Feed, check: Callable[[], None]) -> None:
        self._source, self._feed, self._check = source, feed, check
        self.failure: Failure | None = None
        self._ended = False

    def take(self, step: int, policy: Roles) -> Taken:
        rows = None
        if not self._ended:
            try:
                self._check()
                rows = self._source.next(step, policy)
            except Failure as failure:
                self.failure = failure
            except OSError as error:
                self.failure = EnvironmentFailed(f"{error.filename}: {(error.strerror or str(error)).lower()}")
        self._ended = rows is None
        place = None if rows is None else self._source.get_state()
        return Taken(self._feed(rows or self._feed.empty()), rows, place)


@dataclasses.dataclass(frozen=True)
class Step:
    """An update that was made, skipped, or, at the end, not made."""

    number: int
    state: TrainState
    metrics: dict[str, float]
    taken: Taken


class Hook:
    """What is done besides updating. On several processes, all have the same hooks."""

    def during(self) -> None:
        """While the devices work on the next step."""

    def after(self, step: Step) -> bool:
        """After each step that was made or skipped; True ends the run."""
        return False


def loop(
    update: Callable[[TrainState, Any, Signals], tuple[TrainState, Any]],
    state: TrainState,
    supply: Supply,
    hooks: Sequence[Hook],
    watch: Watch,
    mesh: Mesh,
    steps: int,
) -> tuple[TrainState, Step | None]:
    """Updates `state` until it has made `steps` updates, a hook says so, or a step is not made, on all processes
    together: because one has no batch, or because it was bad. Also returns the last step."""
    done, step = int(state.step), None
    taken = supply.take(done, state.trainable)
    while done < steps:
        watch.enter("step", done + 1)
        here = signals(mesh, done, taken.rows is None, watch.requested is not None)
        state, metrics = update(state, taken.batch, here)
        for hook in hooks:
            hook.during()
        this, taken = taken, supply.take(done + 1, state.trainable) if done + 1 < steps else taken
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # waits for the devices
        step = Step(done + 1, state, values, this)
        if not values["made"]:
            break
        done += 1
        if any([hook.after(step) for hook in hooks]):
            break
    return state, step


def signals(mesh: Mesh, turn: int, missing: bool, stop: bool) -> Signals:
    """What this process tells the others, on its devices."""
    shapes = abstract_signals(mesh)

    def each(flag: bool, shape: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.full(shape.shape, flag, np.int32)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: array[index])

    number = np.asarray(turn, np.int32)
    return Signals(
        jax.make_array_from_callback((), shapes.turn.sharding, lambda _: number),
        each(missing, shapes.missing),
        each(stop, shapes.stop),
    )
