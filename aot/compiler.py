"""Compiles programs in a process of their own and turns what comes back into reports."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from aot import hlo
from aot.census import Wires, census
from aot.memory import Allocation, Memory, OutOfMemory
from aot.programs import Program, check
from aot.report import Report
from aot.targets import parse_target
from aot.worker import ENVIRONMENT
from qwen_jax.errors import InputError
from qwen_jax.local_path import cache_folder

Mode = Literal["full", "estimate"]


class Compiler:
    """Compiles one program after the other, in a process that is started at the first and again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._messages = tempfile.TemporaryFile("w+")

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._messages.close()

    def __call__(
        self, program: Program, mode: Mode = "full", say: Callable[[str], None] = lambda stage: None
    ) -> Report:
        """The report of a program; `say` hears of each stage.

        mode "estimate" only asks, in seconds, how much memory the program would take: its report is then one of
        `out_of_memory`. Raises InputError when the program is impossible or the compiler fails on it.
        """
        check(program)
        parse_target(program.target)
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        request = {"program": program.to_json(), "mode": mode, "cache": str(cache_folder() / "compile")}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            message: dict[str, str] = json.loads(line) if line.startswith("{") else {}
            if "stage" in message:
                say(message["stage"])
            elif "artifact" in message:
                return report(program, Path(message["artifact"]))
            elif "refused" in message:
                raise InputError(message["refused"])
        self._stop()
        self._messages.seek(0)
        lines = [line for line in self._messages.read().splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no message")
        raise InputError(f"the compiler stopped on {program.model} for {program.target}: {reason[:500]}")

    def _start(self) -> subprocess.Popen[str]:
        self._messages.truncate(0)
        return subprocess.Popen(
            [sys.executable, "-m", "aot.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    def _stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()  # which closes the pipes
        self._process = None


def report(program: Program, path: Path) -> Report:
    """The report of a compiled program from the file that the worker wrote."""
    artifact = json.loads(gzip.decompress(path.read_bytes()))
    topology = parse_target(program.target)
    memory, found, refused, copies = None, None, None, ()
    if out_of_memory := artifact.get("out_of_memory"):
        allocations = tuple(Allocation(**allocation) for allocation in out_of_memory.pop("allocations"))
        refused = OutOfMemory(**out_of_memory, allocations=allocations)
    else:
        memory = Memory(**artifact["memory"])
        wires = Wires(topology, artifact["mesh"], artifact["coordinates"], artifact["slices"])
        found = census(hlo.parse(artifact["hlo"]), wires, program.filled_rows)
        copies = tuple(Allocation(**copy) for copy in artifact["second_copies"])
    return Report(
        program=program,
        topology=topology,
        memory=memory,
        census=found,
        out_of_memory=refused,
        copies=copies,
        lower_seconds=artifact["lower_seconds"],
        compile_seconds=artifact["compile_seconds"],
        versions=artifact["versions"],
    )
