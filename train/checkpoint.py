"""Checkpoints of a run: weights, optimiser, step and the place in the data, saved by Orbax while training goes on."""

from __future__ import annotations

import contextlib
import errno
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
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from qwen_jax.errors import EnvironmentFailed, Failure, InputError
from train.files import Lease
from train.processes import gather, together
from train.state import TrainState

# A part of a checkpoint is not there: reading again will not find it. Every other fault of a disk may pass.
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_PASSING_STATUS = re.compile("(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|ABORTED|CANCELLED):")


class Checkpoints:
    """The checkpoints of one folder: the latest `keep`, and the one of the lowest evaluation loss.

    A checkpoint appears whole or not at all. One that cannot be written is reported through `say`, and training goes
    on; the ones before it stay. What happens to one is agreed among the processes of a run, all of which must call
    every method. Raises EnvironmentFailed when another run is at work in the folder, or it cannot be written.
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
        self._lease: Lease | None = None
        with together():
            if jax.process_index() == 0:
                self._lease = Lease(self.folder)
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
            raise EnvironmentFailed(f"{self.folder} cannot be written ({error.strerror}).") from error

    def check_lease(self) -> None:
        """Raises EnvironmentFailed when another run has taken the folder over."""
        if self._lease and self._lease.lost:
            raise EnvironmentFailed(f"another run has taken {self.folder} over; this one, which was away, ends.")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lease:
            self._lease.release()

    def save(self, state: TrainState, place: Any, run: dict[str, Any], loss: float | None = None) -> None:
        """Begins to save the state at its step; `place` is the place in the data, `run` what identifies the
        run and must be the same to go on. Returns when the state may change."""
        self.finish()
        step = int(state.step)
        extra = {"run": run, "place": place}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
        metrics = None if loss is None else {"loss": loss}
        failure = None
        try:
            self._manager.save(step, args=arguments, metrics=metrics, force=True)
        except Exception as error:
            failure = error
        self._begun = self._went_well(failure)

    def finish(self) -> None:
        """Waits until what was begun is on disk."""
        failure = None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            failure = error
        if self._went_well(failure):
            self._failed &= not self._begun
        self._begun = False

    def close(self) -> None:
        """Waits for the last checkpoint. Raises EnvironmentFailed if it could not be written."""
        self.finish()
        self._manager.close()
        if self._lease:
            self._lease.release()
        if self._failed:
            raise EnvironmentFailed(
                f"the last checkpoint could not be written, and {self._latest()}; free some space, then run the same "
                "command again."
            )

    def _went_well(self, error: Exception | None) -> bool:
        """Whether no process failed to write; else says why, and clears what was begun away."""
        reasons = [reason for reason in gather(error and reason_of(error)) if reason]
        if not reasons:
            return True
        self._failed = True
        self._say(f"a checkpoint could not be written ({reasons[0]}); training goes on, and {self._latest()}.")
        if jax.process_index() == 0:
            for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        self._open()
        return False

    def _latest(self) -> str:
        steps = self.steps()
        return f"the last good one is that of step {steps[-1]}" if steps else "there is none before it"

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are."""
        return sorted(self._manager.all_steps())

    def best_loss(self) -> float | None:
        """The lowest evaluation loss of a checkpoint."""
        step = self._manager.best_step()
        metrics = None if step is None else self._manager.metrics(step)
        return metrics["loss"] if metrics else None

    def restore(self, state: TrainState, run: dict[str, Any]) -> tuple[TrainState, Any] | None:
        """The last checkpoint that can be read, as (state, place in the data), or None where there is none.

        state: jax.ShapeDtypeStruct leaves with shardings, of any mesh. A checkpoint in which a second read too finds
        something missing or senseless is set aside, and the one before it taken. A fault that may pass (the disk, the
        network, a device's memory) changes nothing on disk: it raises EnvironmentFailed. Raises InputError when the
        checkpoints are of another run, or none can be read.
        """
        try:
            return self._restore(state, run)
        except Failure:
            self._manager.close()
            if self._lease:
                self._lease.release()
            raise

    def _restore(self, state: TrainState, run: dict[str, Any]) -> tuple[TrainState, Any] | None:
        steps = gather(self.steps())[0]
        for step in reversed(steps):
            if (restored := self._read(step, state, run)) is not None:
                return restored
            self._set_aside(step)
        if steps or any(self.folder.glob("*.damaged-*")):
            raise InputError(
                f"none of the checkpoints in {self.folder} can be read; choose another `out` to start anew, or rename "
                "what was set aside to go on from it."
            )
        return None

    def _read(self, step: int, state: TrainState, run: dict[str, Any]) -> tuple[TrainState, Any] | None:
        """None where some process has twice found the checkpoint damaged."""
        passing = None
        for _ in range(2):
            restored = error = None
            try:
                restored = self._read_here(step, state, run)
            except Exception as caught:
                error = caught
            with together():
                if isinstance(error, Failure):
                    raise error
            found = gather(error and [may_pass(error), reason_of(error)])
            faults = [fault for fault in found if fault]
            if not faults:
                return restored
            del restored  # before the second read needs the memory
            passing = next((reason for passes, reason in faults if passes), passing)
        if passing:
            raise EnvironmentFailed(
                f"checkpoint {step} in {self.folder} could not be read ({passing}); it was left as it is. Run the same "
                f"command again; if the fault stays, repair the disk, or move the folder {step} away to go on from the "
                "one before it."
            )
        self._say(f"checkpoint {step} is damaged ({faults[0][1]}) and is set aside; the one before it is used.")
        return None

    def _read_here(self, step: int, state: TrainState, run: dict[str, Any]) -> tuple[TrainState, Any]:
        """What this process alone reads, without waiting for others, of which one may fail."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
        with contextlib.closing(ocp.CheckpointManager(self.folder, options=options)) as reader:
            extra = reader.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]
            self._check(extra, run)
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(state))
            return reader.restore(step, args=arguments)["state"], extra["place"]

    def _check(self, extra: Any, run: dict[str, Any]) -> None:
        run = json.loads(json.dumps(run))
        if changed := [name for name in run if extra["run"].get(name) != run[name]]:
            raise InputError(
                f"the checkpoints in {self.folder} are of another run: {changed[0]} was "
                f"{extra['run'].get(changed[0])} and is now {run[changed[0]]}; choose another `out`."
            )

    def _set_aside(self, step: int) -> None:
        with together():
            if jax.process_index() == 0:
                (self.folder / str(step)).rename(self.folder / f"{step}.damaged-{os.getpid()}")
        self._manager.close()
        self._open()


def may_pass(error: BaseException | None) -> bool:
    """Whether what reading or writing raised may be gone the next time: anything but missing or senseless files."""
    while error is not None:
        number = _errno(error)
        if number is not None:
            return number not in _MISSING
        if isinstance(error, OSError | MemoryError | jax.errors.JaxRuntimeError) or _PASSING_STATUS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _errno(error: BaseException) -> int | None:
    """The operating system's number in an exception of Python or TensorStore."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else getattr(error, "errno", None)


def reason_of(error: BaseException) -> str:
    """Why something could not be read or written, in a few words."""
    number = _errno(error)
    return os.strerror(number).lower() if number else f"{type(error).__name__}: {error}".splitlines()[0][:100]


def _quiet_hook(unraisable: sys.UnraisableHookArgs) -> None:
    """Not a word of the other reads and writes under way, which Orbax drops when one has failed, or of their loop."""
    dropped = unraisable.object
    of_orbax = inspect.iscoroutine(dropped) and "orbax" in dropped.cr_code.co_filename
    if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _loss(metrics: Any) -> float:
    return metrics["loss"]
