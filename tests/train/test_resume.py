"""Runs that are killed, stopped, damaged or cut short end as if nothing had happened, or say in a sentence why not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.train.runs import (
    ROOT,
    command,
    environment,
    final_weights,
    losses,
    make_run,
    run,
    start,
    wait_for_step,
)
from train.trainer import main


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """An experiment that has run to its end, uninterrupted, in `out`."""
    file = make_run(tmp_path_factory.mktemp("run"))
    status, text = run(file)
    assert status == 0, text
    return file


def out(experiment: Path, name: str) -> tuple[Path, list[str]]:
    folder = experiment.parent / name
    return folder, ["--out", str(folder)]


def assert_same_run(experiment: Path, folder: Path) -> None:
    """Every loss and every weight, bit for bit."""
    expected = losses(experiment.parent / "out")
    assert list(expected) == list(range(1, 13)) and losses(folder) == expected
    weights = final_weights(folder)
    for path, leaf in final_weights(experiment.parent / "out").items():
        np.testing.assert_array_equal(weights[path], leaf)


def names(folder: Path) -> list[str]:
    """The checkpoints that there are."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name[0] != ".")


def copy_of_run(experiment: Path, name: str, without: tuple[str, ...] = ()) -> tuple[Path, list[str]]:
    folder, arguments = out(experiment, name)
    shutil.copytree(experiment.parent / "out", folder)
    for step in without:
        shutil.rmtree(folder / "checkpoints" / step)
    return folder, arguments


def test_it_learns_and_leaves_what_it_promises(experiment):
    folder = experiment.parent / "out"
    values = losses(folder)
    assert values[12] < values[1] - 0.5
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"grad_norm", "learning_rate", "tokens_per_second", "accuracy", "tokens"} <= lines[0].keys()
    assert "mfu" not in lines[0]  # no peak is claimed for a CPU
    assert (folder / "curves.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").glob("events*"))
    assert names(folder) == ["12", "9"]


@pytest.mark.slow
def test_killed_and_stopped_at_random_steps(experiment):
    """Kill -9, then SIGTERM, then to the end."""
    rng = np.random.default_rng()
    folder, arguments = out(experiment, "killed")
    killed, stopped = int(rng.integers(1, 8)), int(rng.integers(8, 11))
    process = start(experiment, *arguments)
    wait_for_step(process, killed)
    process.kill()
    process.communicate()
    process = start(experiment, *arguments)
    wait_for_step(process, stopped)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, (killed, stopped, text)
    assert "is saved; the same command goes on" in text
    status, text = run(experiment, *arguments)
    assert status == 0, text
    assert "going on from the checkpoint of step" in text
    assert_same_run(experiment, folder)


def test_a_damaged_checkpoint_is_set_aside(experiment):
    folder, arguments = copy_of_run(experiment, "damaged")
    largest = max((folder / "checkpoints" / "12").rglob("d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    (folder / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()  # what a kill during a save leaves
    status, text = run(experiment, *arguments)
    assert status == 0, text
    assert "checkpoint 12 is damaged" in text and "going on from the checkpoint of step 9" in text
    assert_same_run(experiment, folder)


def run_on_full_disk(experiment, *arguments):
    """Status and messages of a run whose files may have 50 kB."""
    limited = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
{command(experiment)[2]}
"""
    done = subprocess.run(
        [sys.executable, "-c", limited, "train", str(experiment), *arguments],
        env=environment(experiment) | {"JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_full_disk_costs_nothing_but_the_new_checkpoints(experiment):
    folder, arguments = copy_of_run(experiment, "full", without=("12",))
    status, text = run_on_full_disk(experiment, *arguments)
    assert status == 75, text
    assert (
        "a checkpoint could not be written (file too large); training goes on, and the last good one is that of step 9."
        in text
    )
    assert "Traceback" not in text
    assert (
        text.rstrip()
        .splitlines()[-1]
        .startswith("qwen-jax: the last checkpoint could not be written, and the last good one is")
    )
    assert names(folder) == ["9"]
    status, text = run(experiment, *arguments)
    assert status == 0, text
    assert_same_run(experiment, folder)


def test_a_disk_that_is_full_at_the_end_costs_no_more_than_the_final_weights(experiment):
    folder, arguments = copy_of_run(experiment, "full at the end")
    shutil.rmtree(folder / "final")
    status, text = run_on_full_disk(experiment, *arguments)
    assert status == 75, text
    assert "final could not be written (file too large); free some space" in text and "Traceback" not in text
    status, text = run(experiment, *arguments)
    assert status == 0, text
    assert_same_run(experiment, folder)


def test_another_mesh_goes_on_with_the_same_values(experiment):
    folder, arguments = copy_of_run(experiment, "mesh", without=("12",))
    status, text = run(experiment, *arguments, "--mesh.fsdp", "2", "--mesh.tensor", "2", devices=4)
    assert status == 0, text
    expected = losses(experiment.parent / "out")
    np.testing.assert_allclose(list(losses(folder).values()), list(expected.values()), rtol=2e-6)
    weights = final_weights(folder)
    for path, leaf in final_weights(experiment.parent / "out").items():
        np.testing.assert_allclose(weights[path], leaf, atol=2e-5, err_msg=path)


def test_a_loss_that_is_not_finite_stops_with_its_batch(experiment):
    folder, arguments = out(experiment, "infinite")
    status, text = run(experiment, *arguments, "--optimizer.learning-rate", "1e38", "--optimizer.warmup-steps", "3")
    assert status == 1, text
    said = text.rstrip().splitlines()[-1]
    assert said.startswith("qwen-jax: the loss or gradient of step") and "is not finite" in said
    (file,) = folder.glob("not-finite-step-*.npz")
    step = int(file.stem.split("-")[3])
    assert str(file) in said and names(folder) == [str(step - 1)]
    assert np.load(file)["tokens"].shape == (8, 32)


def test_a_bad_record_in_mid_run_costs_nothing(experiment):
    """The state before it is saved, and what the sentence names can be repaired, or left out."""
    texts = experiment.parent / "texts"
    texts.mkdir()
    for number in range(120):
        (texts / f"{number:03}.txt").write_bytes(b"x" * 200)
    (texts / "101.txt").write_bytes(b"not \xff fine")  # not one of those that are looked at before training
    folder, arguments = out(experiment, "bad")
    arguments += ["--data.sources.0.path", str(texts), "--data.no-shuffle", "--data.packing", "concat"]
    arguments += ["--data.epochs", "1", "--steps", "99", "--checkpoint-every", "1000", "--data.batch-size", "16"]
    status, text = run(experiment, *arguments)
    assert status == 2 and f"{texts}/101.txt is not UTF-8" in text.rstrip().splitlines()[-1], text
    done = max(losses(folder))
    assert done > 30 and names(folder) == [str(done)]


def test_what_cannot_run_is_said_in_a_sentence(experiment):
    status, text = run(experiment, "--data.sources.0.path", "absent.jsonl")
    assert status == 2, text
    assert "absent.jsonl" in text.rstrip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--data.batch-size", "6", "--step.accumulate", "4"], "micro-batches"),
        (["--mesh.fsdp", "3"], "devices"),
        (["--model", "absent"], "absent does not exist"),
        (["--optimizer.frozen", "nothing"], "finds no parameter"),
        (["--optimizer.moments", "bfloat16"], "are of another run: moments was float32 and is now bfloat16"),
    ],
    ids=["batch", "mesh", "model", "frozen", "another run"],
)
def test_what_cannot_run(experiment, arguments, said):
    with pytest.raises(InputError, match=said):
        main([str(experiment), *arguments])


def test_the_command_lists_experiments():
    program = command(Path("x"))[:3]
    done = subprocess.run(
        [*program, "train", "--help"], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0 and b"experiments:" in done.stdout
