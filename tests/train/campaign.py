"""Runs that are broken off again and again, and must end as the one that never was.

A campaign has a folder, in which it goes on where it was itself cut off, and a tally in tally.json.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.train.runs import environment, final_weights, losses, make_run, run

SETTINGS = """
import dataclasses
small = dataclasses.replace(data, epochs=1)
config = dataclasses.replace(config, eval_data=small, eval_every=4, eval_batches=4)
"""


# Importing takes most of a short run, so runs are forked from a process that has done that, before JAX has any thread.
SERVER = """
import json, os, sys
import jax, matplotlib.pyplot, orbax.checkpoint
import train.checkpoint, train.data.loader, train.hooks, train.loop, train.metrics, train.trainer, train.weights
from qwen_jax.cli import main

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    jax.config.update("jax_compilation_cache_dir", request["programs"])
    sys.exit(main(["train", *request["arguments"]]))
"""


class Starter:
    """Starts runs of an experiment, one at a time; use it in `with`."""

    def __init__(self, experiment: Path) -> None:
        self._experiment, self._stderr = experiment, experiment.parent / "stderr"
        self._server: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment(experiment), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, bufsize=1,
        )  # fmt: skip

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.communicate()

    def start(self, *arguments: str, programs: str = "compiled") -> None:
        assert self._server.stdin and self._server.stdout
        arguments = (str(self._experiment), *arguments)
        where = {"stderr": str(self._stderr), "programs": str(self._experiment.parent / programs)}
        self._server.stdin.write(json.dumps(where | {"arguments": arguments}) + "\n")
        self._process = int(self._server.stdout.readline())
        self._status: int | None = None

    @property
    def text(self) -> str:
        """What the run has written so far."""
        return self._stderr.read_text() if self._stderr.exists() else ""

    def poll(self) -> int | None:
        """Its status; None while it runs."""
        assert self._server.stdout
        if self._status is None and select.select([self._server.stdout], [], [], 0)[0]:
            self._status = int(self._server.stdout.readline())
        return self._status

    def wait(self) -> int:
        assert self._server.stdout
        if self._status is None:
            self._status = int(self._server.stdout.readline())
        return self._status

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self._process, signal.SIGKILL)
        return self.wait()


class Campaign:
    """kinds: of what breaks runs off, each counted by itself."""

    def __init__(self, folder: Path, kinds: Sequence[str]) -> None:
        self.experiment = folder / "experiment.py"
        self._tally_file, self._reference = folder / "tally.json", folder / "out"
        if not self._tally_file.exists():
            folder.mkdir(parents=True, exist_ok=True)  # one that was cut off before it had begun
            make_run(folder)
            self.experiment.write_text(self.experiment.read_text() + SETTINGS)
            status, text = run(self.experiment, "--export", f"{self._reference}-export")
            assert status == 0, text
            self._tally_file.write_text(json.dumps(dict.fromkeys((*kinds, "whole runs"), 0)))
        self.tally = json.loads(self._tally_file.read_bytes())
        self._expected, self._weights = losses(self._reference), final_weights(self._reference)

    @property
    def size(self) -> int:
        """Bytes of the files of a whole run."""
        files = [*self._reference.rglob("*"), *Path(f"{self._reference}-export").rglob("*")]
        return sum(file.stat().st_size for file in files)

    def count(self, kind: str) -> None:
        self.tally[kind] += 1
        self._tally_file.write_text(json.dumps(self.tally))

    def check_whole(self, folder: Path) -> None:
        """A run that has come to its end, which is then removed: every loss, weight and exported byte."""
        assert losses(folder) == self._expected
        ours = final_weights(folder)
        for path, leaf in self._weights.items():
            np.testing.assert_array_equal(ours[path], leaf)
        exported = [Path(f"{out}-export") for out in (folder, self._reference)]
        for file in exported[1].iterdir():
            assert filecmp.cmp(file, exported[0] / file.name, shallow=False), file.name
        for ended in (exported[0], folder):
            shutil.rmtree(ended)
        self.count("whole runs")


def checkpoints(folder: Path) -> list[int]:
    """Steps of those that are whole; none may have been set aside."""
    names = [path.name for path in folder.glob("checkpoints/*")]
    assert not any("damaged" in name for name in names), names
    return sorted(int(name) for name in names if name.isdigit())


def check_files(folder: Path) -> None:
    """Every file that is there is whole; of metrics.jsonl the last line may be cut off."""
    if (folder / "config.json").exists():
        json.loads((folder / "config.json").read_bytes())
    if (folder / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == list(range(1, len(steps) + 1))
        saved = checkpoints(folder)
        assert not saved or len(steps) >= saved[-1]
