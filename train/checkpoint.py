"""Checkpoints of a run: weights, optimiser, step and the place in the data, saved by Orbax while training goes on."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from qwen_jax.errors import InputError
from train.step import TrainState


class Checkpoints:
    """The checkpoints of one folder: the latest `keep`, and the one of the lowest evaluation loss.

    A checkpoint appears whole or not at all. One that cannot be written is reported through `say`, and training goes
    on; the ones before it stay. All processes of a run must call every method.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder.absolute(), say
        self._keep = keep
        self._failed = self._begun = False
        # they print whole stack traces of what is reported here in one sentence, some while the process ends
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        sys.unraisablehook = _quiet_hook
        self._open()

    def _open(self) -> None:
        policies = checkpoint_managers
        best = policies.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_loss,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), best]),
            cleanup_tmp_directories=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}); choose another folder.") from error

    def save(self, state: TrainState, place: Any, run: dict[str, Any], loss: float | None = None) -> None:
        """Begins to save the state at its step; `place` is this process's place in the data, `run` what identifies the
        run and must be the same to go on. Returns when the state may change."""
        self.finish()
        step = int(state.step)
        extra = {"run": run, "places": _gather_json(place)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
        metrics = None if loss is None else {"loss": loss}
        try:
            self._manager.save(step, args=arguments, metrics=metrics, force=True)
            self._begun = True
        except Exception as error:
            self._report(error)

    def finish(self) -> None:
        """Waits until what was begun is on disk."""
        try:
            self._manager.wait_until_finished()
            self._failed &= not self._begun
        except Exception as error:
            self._report(error)
        self._begun = False

    def close(self) -> None:
        """Waits for the last checkpoint. Raises InputError if it could not be written."""
        self.finish()
        self._manager.close()
        if self._failed:
            raise InputError(
                f"the last checkpoint could not be written, and {self._latest()}; free some space, then run the same "
                "command again."
            )

    def _report(self, error: Exception) -> None:
        self._failed = True
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        reason = os.strerror(number).lower() if number else str(error).splitlines()[0]
        self._say(f"a checkpoint could not be written ({reason}); training goes on, and {self._latest()}.")
        if jax.process_index() == 0:
            for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        self._open()

    def _latest(self) -> str:
        steps = self.steps()
        return f"the last good one is that of step {steps[-1]}" if steps else "there is none before it"

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are."""
        return sorted(self._manager.all_steps())

    def restore(self, state: TrainState, run: dict[str, Any]) -> tuple[TrainState, Any] | None:
        """The last checkpoint that can be read, as (state, place in the data), or None where there is none.

        state: jax.ShapeDtypeStruct leaves with shardings, of any mesh. A damaged checkpoint is set aside, and the one
        before it taken. Raises InputError when the checkpoints are of another run, or none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                arguments = ocp.args.Composite(extra=ocp.args.JsonRestore())
                extra = self._manager.restore(step, args=arguments)["extra"]
                self._check(extra, run)
                arguments = ocp.args.Composite(state=ocp.args.StandardRestore(state))
                restored = self._manager.restore(step, args=arguments)["state"]
                return restored, extra["places"][jax.process_index()]
            except InputError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                self._say(f"checkpoint {step} is damaged ({reason}) and is set aside; the one before it is used.")
                self._set_aside(step)
        if steps:
            raise InputError(
                f"none of the checkpoints in {self.folder} can be read; choose another `out` to start anew."
            )
        return None

    def _check(self, extra: Any, run: dict[str, Any]) -> None:
        run = json.loads(json.dumps(run))
        if changed := [name for name in run if extra["run"].get(name) != run[name]]:
            raise InputError(
                f"the checkpoints in {self.folder} are of another run: {changed[0]} was "
                f"{extra['run'].get(changed[0])} and is now {run[changed[0]]}; choose another `out`."
            )
        if len(extra["places"]) != jax.process_count():
            raise InputError(
                f"the checkpoints in {self.folder} were written by {len(extra['places'])} processes and there are now "
                f"{jax.process_count()}, among which the data is divided otherwise; start as many as before."
            )

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            name = next(path for path in self.folder.iterdir() if path.is_dir() and path.name == str(step))
            name.rename(self.folder / f"{step}.damaged-{os.getpid()}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        self._manager.close()
        self._open()


def _quiet_hook(unraisable: sys.UnraisableHookArgs) -> None:
    """Not a word of the other reads and writes under way, which Orbax drops when one has failed, or of their loop."""
    dropped = unraisable.object
    of_orbax = inspect.iscoroutine(dropped) and "orbax" in dropped.cr_code.co_filename
    if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def _gather_json(value: Any) -> list[Any]:
    """The value of every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size)).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]
