"""What hangs on the loop of a run: guard, report, profiler, evaluation, checkpoints and the stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import CheckFailed
from qwen_jax.flops import utilisation
from train.checkpoint import Checkpoints
from train.loop import Hook, Source, Step
from train.metrics import Display, Recorder
from train.objective import Term
from train.state import TrainState
from train.watch import SAVING, Watch

PROFILED_STEPS = 3
_SIGNALS = ("good", "made", "missing", "stop")


class Guard(Hook):
    """Keeps the batch of each bad step, and says why the last one was not made."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self._out, self._say = out, say

    def after(self, step: Step) -> bool:
        if not step.metrics["good"]:
            what, file = self._keep(step)
            self._say(f"{what}; it is left out, number {step.metrics['skipped']:.0f} so far; its batch is in {file}")
        return False

    def failure(self, step: Step | None) -> CheckFailed | None:
        """Where the last step was too bad to be made."""
        if step is None or step.metrics["made"] or step.metrics["missing"]:
            return None
        what, file = self._keep(step)
        return CheckFailed(
            f"{what}; its batch is in {file}, and the weights before it in the checkpoint of step {step.number - 1}; "
            "look at the batch, lower the learning rate, or let some be left out by step.skip_nonfinite, and run the "
            "same command again."
        )

    def _keep(self, step: Step) -> tuple[str, Path]:
        """What is wrong with the step, and the file of its batch."""
        loss, norm = step.metrics["loss"], step.metrics["grad_norm"]
        if math.isfinite(loss) and math.isfinite(norm):
            kind, what = "spike", f"the gradient of step {step.number} is a spike (norm {norm:.3g})"
        else:
            kind, what = "not-finite", f"the loss or gradient of step {step.number} is not finite (loss {loss})"
        file = self._out / f"{kind}-step-{step.number}-process-{jax.process_index()}.npz"
        try:
            np.savez(file, allow_pickle=False, **(step.taken.rows or {}))
        except OSError as error:
            self._say(f"{file} could not be written ({error.strerror})")
        return what, file


class Report(Hook):
    """The bar or lines on the terminal, and metrics.jsonl, written while the devices work on the next step."""

    def __init__(
        self, display: Display, recorder: Recorder | None, source: Source, model: ModelConfig, rows: int, length: int,
        steps: int, began: float,
    ) -> None:  # fmt: skip
        self._display, self._recorder, self._source = display, recorder, source
        self._model, self._rows, self._length, self._steps = model, rows, length, steps
        self._began = began
        self._step_began = self._productive = self._usual = 0.0
        self._pending: list[tuple[int, dict[str, float]]] = []

    def record(self, step: int, values: dict[str, float]) -> None:
        """Has values written after those of the steps before."""
        self._pending.append((step, values))

    def during(self) -> None:
        self._step_began = time.monotonic()
        self.flush()

    def flush(self) -> None:
        """Writes what has been recorded."""
        for step, values in self._pending:
            if self._recorder:
                self._recorder.record(step, values)
        self._pending.clear()

    def close(self) -> None:
        self.flush()
        if self._recorder:
            self._recorder.close()

    def after(self, step: Step) -> bool:
        now = time.monotonic()
        seconds = now - self._step_began
        self._productive += seconds
        values = {name: value for name, value in step.metrics.items() if name not in _SIGNALS}
        if not step.metrics["skipped"]:
            del values["skipped"]
        values |= {"seconds": seconds, "tokens_per_second": self._rows * self._length / seconds}
        if (mfu := utilisation(self._model, self._rows, self._length, seconds)) is not None:
            values["mfu"] = mfu
        values |= {"goodput": self._productive / (now - self._began)} | self._source.metrics()
        self._usual = seconds if not self._usual else 0.9 * self._usual + 0.1 * seconds
        self._display.show(step.number, values, (self._steps - step.number) * self._usual)
        self.record(step.number, values)
        return False


class Profiler(Hook):
    """Traces three steps from `first` on."""

    def __init__(self, first: int, done: int, folder: Path, say: Callable[[str], None]) -> None:
        self._first, self._folder, self._say = first, folder, say
        self._last: int | None = None
        if done == first:
            self._start(done)

    def _start(self, step: int) -> None:
        jax.profiler.start_trace(str(self._folder))
        self._last = step + PROFILED_STEPS

    def after(self, step: Step) -> bool:
        if step.number == self._first:
            self._start(step.number)
        elif step.number == self._last:
            self.close()
        return False

    def close(self) -> None:
        if self._last is not None:
            jax.profiler.stop_trace()
            self._say(f"a trace of {PROFILED_STEPS} steps is in {self._folder}")
            self._last = None


class Evaluation(Hook):
    """Loss and other terms of the objective on the same batches, every so many steps."""

    def __init__(
        self, measure: Callable[[Any, Any], dict[str, Term]], batches: Sequence[Any], every: int, report: Report,
        watch: Watch, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._measure, self._batches, self._every = measure, batches, every
        self._report, self._watch, self._say = report, watch, say
        self.last: tuple[int, float] | None = None
        """Step and loss of the last evaluation."""

    def after(self, step: Step) -> bool:
        if step.number % self._every == 0:
            self.run(step.number, step.state)
        return False

    def run(self, number: int, state: TrainState) -> None:
        if self.last and self.last[0] == number:
            return
        self._watch.enter("evaluation", f"after step {number}")
        total = None
        for batch in self._batches:
            terms = self._measure(state.trainable, batch)
            total = terms if total is None else jax.tree.map(lambda a, b: a + b, total, terms)
        assert total is not None
        values = {f"eval_{name}": float(term.mean) for name, term in jax.device_get(total).items()}
        self.last = number, values["eval_loss"]
        self._report.record(number, values)
        self._say(
            f"step {number}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        )


class Saver(Hook):
    """A checkpoint every so many steps, and whenever an evaluation has found the lowest loss so far."""

    def __init__(
        self, checkpoints: Checkpoints, run: dict[str, Any], every: int, done: int, place: Any,
        evaluation: Evaluation | None, report: Report, watch: Watch,
    ) -> None:  # fmt: skip
        self._checkpoints, self._run, self._every, self._evaluation = checkpoints, run, every, evaluation
        self._report, self._watch = report, watch
        self._saved, self._best = done, checkpoints.best_loss()
        self._place = place
        self.done = done
        """Updates made or skipped."""

    def after(self, step: Step) -> bool:
        self.done, self._place = step.number, step.taken.place
        loss = self._loss()
        if step.number % self._every == 0 or (loss is not None and (self._best is None or loss < self._best)):
            self.save(step.state)
        return False

    def save(self, state: TrainState) -> None:
        """Of the last good step, unless it is saved already."""
        if self._saved == self.done:
            return
        self._watch.enter(SAVING, f"of step {self.done}")
        self._report.flush()  # what a run that goes on from here will not write again
        loss = self._loss()
        self._checkpoints.save(state, self._place, self._run, loss)
        self._saved = self.done
        self._best = min((value for value in (loss, self._best) if value is not None), default=None)

    def _loss(self) -> float | None:
        """Of an evaluation of this very step."""
        last = self._evaluation.last if self._evaluation else None
        return last[1] if last and last[0] == self.done else None


class Stop(Hook):
    """Ends the run when a process has been asked to stop."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.by: signal.Signals | None = None

    def after(self, step: Step) -> bool:
        if step.metrics["stop"] or (self._watch.requested and jax.process_count() == 1):
            self.by = self._watch.requested or signal.SIGTERM
        return self.by is not None
