"""Runs of several processes, which go on together, end together, and never wait for one that is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import final_weights, losses, make_run, start, wait_for_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def uninterrupted(experiment) -> Path:
    """The folder of a run of two processes."""
    folder = experiment.parent / "out"
    statuses, texts = together(experiment, folder)
    assert statuses == [0, 0], texts
    assert "2 x cpu (fsdp=2)" in texts[0] and "step 12/12" in texts[0]
    assert "step 12/12" not in texts[1]
    return folder


def begin(
    experiment: Path, folder: Path, *arguments: str, count: int = 2, devices: int = 1, only: dict | None = None,
    fault: str = "",
):  # fmt: skip
    """Starts the processes of a run; `only` gives some of them more arguments, `fault` is what befalls process 1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = ["--out", str(folder), "--log-every", "1", *arguments]
    if count > 1:
        common += ["--processes.coordinator", f"localhost:{port}", "--processes.count", str(count)]
    return [
        start(experiment, *common, *([f"--processes.index={i}"] if count > 1 else []), *(only or {}).get(i, []),
              devices=devices, first=fault if i == 1 else "")
        for i in range(count)
    ]  # fmt: skip


def end(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Statuses and what was written to stderr; each process must end by itself, in a sentence where it fails."""
    texts = [process.communicate(timeout=900)[1] for process in processes]
    assert not any("Traceback" in text for text in texts), texts
    return [process.returncode for process in processes], texts


def together(experiment: Path, folder: Path, *arguments: str, **settings):
    return end(begin(experiment, folder, *arguments, **settings))


def last_line(text: str) -> str:
    return next(line for line in reversed(text.splitlines()) if line.startswith("qwen-jax:"))


def copy(folder: Path, name: str, without: tuple[str, ...]) -> Path:
    target = folder.parent / name
    shutil.copytree(folder, target)
    for step in without:
        shutil.rmtree(target / "checkpoints" / step)
    return target


def assert_same_run(folder: Path, expected: Path, tolerance: float = 0.0) -> None:
    ours, theirs = losses(folder), losses(expected)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=tolerance)
    weights = final_weights(folder)
    for path, leaf in final_weights(expected).items():
        np.testing.assert_allclose(weights[path], leaf, rtol=0, atol=10 * tolerance, err_msg=path)


@pytest.mark.parametrize(
    "count, devices, mesh, tolerance",
    [(1, 2, [], 0.0), (2, 1, [], 0.0), (4, 1, [], 2e-6), (2, 2, ["--mesh.tensor", "2"], 2e-6)],
    ids=["1 process, same mesh", "2 processes, same mesh", "4 processes", "2 processes, another mesh"],
)
def test_a_run_goes_on_with_another_number_of_processes(experiment, uninterrupted, count, devices, mesh, tolerance):
    folder = copy(uninterrupted, f"resumed-{count}-{devices}", without=("12",))
    statuses, texts = together(experiment, folder, *mesh, count=count, devices=devices)
    assert statuses == [0] * count, texts
    assert "going on from the checkpoint of step 9" in texts[0]
    assert_same_run(folder, uninterrupted, tolerance)


def test_finite_data_and_a_small_evaluation_end_all_at_the_same_step(experiment, uninterrupted):
    arguments = ["--data.epochs", "1", "--steps", "999", "--checkpoint-every", "1000", "--eval-every", "20"]
    small = experiment.parent / "small.jsonl"
    small.write_text("".join((experiment.parent / "data.jsonl").read_text().splitlines(keepends=True)[:30]))
    results = {}
    for count in (2, 1):
        folder = experiment.parent / f"finite-{count}"
        file = experiment.parent / "finite.py"
        file.write_text(
            experiment.read_text() + "import dataclasses\n"
            f"small = dataclasses.replace(data, sources=(SourceConfig({str(small)!r}),), epochs=1)\n"
            "config = dataclasses.replace(config, eval_data=small)\n"
        )
        statuses, texts = together(file, folder, *arguments, count=count, devices=3 - count)
        assert statuses == [0] * count, texts
        assert "the data ended after" in texts[0]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        results[count] = [line for line in lines if "eval_loss" in line], losses(folder)
        last = max(results[count][1])
        assert last > 20 and str(last) in os.listdir(folder / "checkpoints")
        assert results[count][0][-1]["step"] == last
    assert results[1] == results[2]


def test_sigterm_to_one_and_kill_9_of_one_cost_nothing(experiment, uninterrupted):
    folder = experiment.parent / "interrupted"
    processes = begin(experiment, folder)
    wait_for_step(processes[0], 4)
    processes[1].send_signal(signal.SIGTERM)
    statuses, texts = end(processes)
    assert statuses == [143, 143], texts
    assert "which is saved; the same command goes on" in texts[0]

    processes = begin(experiment, folder)
    wait_for_step(processes[0], 8)
    processes[1].kill()
    (status, _), texts = end(processes)
    assert status == 75, texts
    assert "a device or another process failed" in last_line(texts[0])

    statuses, texts = together(experiment, folder)
    assert statuses == [0, 0], texts
    assert_same_run(folder, uninterrupted)


def test_a_fault_in_one_process_ends_both_with_its_sentence(experiment):
    """A file that only one of them has damaged."""
    folders = [experiment.parent / f"texts-{i}" for i in range(2)]
    for folder in folders:
        folder.mkdir()
        for number in range(300):
            (folder / f"{number:03}.txt").write_bytes(b"x" * 100)
    (folders[1] / "201.txt").write_bytes(b"x" * 50 + b"\xff" + b"x" * 49)
    out = experiment.parent / "fault"
    arguments = ["--data.no-shuffle", "--data.packing", "concat", "--steps", "99", "--checkpoint-every", "1000"]
    only = {i: ["--data.sources.0.path", str(folder)] for i, folder in enumerate(folders)}
    statuses, texts = together(experiment, out, *arguments, only=only)
    assert statuses == [2, 2], texts
    assert "201.txt is not UTF-8" in last_line(texts[1])
    assert "process 1: " in last_line(texts[0]) and "201.txt is not UTF-8" in last_line(texts[0])
    done = max(losses(out))
    assert done > 10 and os.listdir(out / "checkpoints").count(str(done)) == 1


RESTORE = """
import errno
import orbax.checkpoint as ocp

real, calls = ocp.CheckpointManager.restore, []

def restore(self, *args, **kwargs):
    calls.append(1)
    if len(calls) % 2 == 0:  # the state, after the place in the data
        raise OSError(errno.EIO, "Input/output error")
    return real(self, *args, **kwargs)

ocp.CheckpointManager.restore = restore
"""


def test_a_disk_that_fails_one_process_at_the_start_ends_both_and_costs_nothing(experiment, uninterrupted):
    folder = copy(uninterrupted, "unread", without=("12",))
    statuses, texts = together(experiment, folder, fault=RESTORE)
    assert statuses == [75, 75], texts
    assert all("checkpoint 9" in last_line(text) and "it was left as it is" in last_line(text) for text in texts)
    statuses, texts = together(experiment, folder)
    assert statuses == [0, 0], texts
    assert_same_run(folder, uninterrupted)
