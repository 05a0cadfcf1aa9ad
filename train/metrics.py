"""What a run reports: a progress bar, metrics.jsonl and TensorBoard, a plot, and model FLOPs utilisation."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train import events
from train.files import Appended, write_whole


class Recorder:
    """metrics.jsonl, one line per step and evaluation, and the same as TensorBoard events, in one folder.

    A run that goes on from `step` loses the lines after it, which it writes again. While a disk is full they wait for
    room. Raises EnvironmentFailed where the file cannot be written at the start, and leaves the old one.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]) -> None:
        self.path, self._say = folder / "metrics.jsonl", say
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write_whole(self.path, lambda file: file.writelines(json.dumps(line).encode() + b"\n" for line in kept))
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}"
        self._lines, self._events = Appended(self.path), Appended(folder / "tensorboard" / name)
        self._events.write(events.header())
        self._events.write(events.restart(step + 1))

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes values of a step; what is not finite, which JSON has no word for, as null."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        waited = self._lines.waiting
        self._lines.write(json.dumps({"step": step} | dict.fromkeys(values) | finite).encode() + b"\n")
        if self._lines.waiting and not waited:
            self._say(f"metrics cannot be written to {self.path} now ({self._lines.fault}); training goes on.")
        self._events.write(events.scalars(step, finite))

    def close(self) -> None:
        for log in (self._lines, self._events):
            log.close()
        if self._lines.waiting:
            self._say(f"the last lines of {self.path} could not be written ({self._lines.fault}).")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for what a killed run left unfinished; empty if there is no such file."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


class Display:
    """A bar where the output is a terminal, else a line now and then; and sentences in between."""

    def __init__(self, total: int, every: int, *, show: bool) -> None:
        self._console = Console(stderr=True, quiet=not show, highlight=False)
        self._total, self._every = total, every
        columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()]
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("", total=total)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def start(self, step: int) -> None:
        self._progress.update(self._task, completed=step)
        self._progress.start()

    def show(self, step: int, values: dict[str, float], eta_seconds: float) -> None:
        text = f"loss {values['loss']:.4f} | {values['tokens_per_second']:,.0f} tok/s"
        if "mfu" in values:
            text += f" | MFU {values['mfu']:.1%}"
        self._progress.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and (step % self._every == 0 or step == self._total):
            hours, rest = divmod(round(eta_seconds), 3600)
            self.say(f"step {step}/{self._total} | {text} | {hours}:{rest // 60:02}:{rest % 60:02} left")

    def stop(self) -> None:
        self._progress.stop()


def plot(path: Path) -> Path:
    """Draws loss, gradient norm and throughput of a metrics.jsonl as curves.png beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_lines(path)
    steps = [line for line in lines if "loss" in line]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    names = ("loss", "grad_norm", "tokens_per_second")
    labels = ("loss (nats per token)", "gradient norm before clipping", "tokens per second")
    for axis, name, label in zip(axes, names, labels, strict=True):
        axis.plot([line["step"] for line in steps], [line[name] for line in steps], label="training", linewidth=1)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    if evaluations := [line for line in lines if "eval_loss" in line]:
        axes[0].plot([e["step"] for e in evaluations], [e["eval_loss"] for e in evaluations], "o-", label="evaluation")
        axes[0].legend()
    axes[1].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    curves = path.with_name("curves.png")
    write_whole(curves, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
    return curves
