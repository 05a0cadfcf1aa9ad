"""What hangs on the loop: bad batches are kept, the best checkpoint whenever an evaluation finds it."""

from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import CheckFailed
from tests.train.tiny import packed_batch
from train.hooks import Guard, Report, Saver
from train.loop import Step, Taken
from train.metrics import Display
from train.state import TrainState
from train.watch import Watch

ROWS = vars(packed_batch(2, 16))


def step_of(number: int, **metrics: float) -> Step:
    values = {"loss": 2.0, "grad_norm": 1.0, "good": 1.0, "made": 1.0, "skipped": 0.0, "missing": 0.0, "stop": 0.0}
    state = TrainState(jnp.int32(number), {"w": jnp.zeros(2)}, ())
    return Step(number, state, values | metrics, Taken(None, ROWS, {"place": number}))


@pytest.mark.parametrize(
    "metrics, file, said",
    [
        ({"loss": float("nan")}, "not-finite-step-5-process-0.npz", "the loss or gradient of step 5 is not finite"),
        ({"grad_norm": 40.0}, "spike-step-5-process-0.npz", "the gradient of step 5 is a spike (norm 40)"),
    ],
    ids=["not finite", "spike"],
)
def test_the_batch_of_a_bad_step_is_kept(tmp_path, metrics, file, said):
    """Where the step is left out, which goes on, and where it ends the run."""
    for left_out in (True, False):
        sentences: list[str] = []
        guard = Guard(tmp_path, sentences.append)
        step = step_of(5, good=0.0, made=float(left_out), skipped=float(left_out), **metrics)
        if left_out:
            assert not guard.after(step) and guard.failure(step) is None
            (sentence,) = sentences
            assert sentence.startswith(said) and f"left out, number 1 so far; its batch is in {tmp_path}" in sentence
        else:
            failure = guard.failure(step)
            assert isinstance(failure, CheckFailed) and str(failure).startswith(said)
            assert "the weights before it in the checkpoint of step 4" in str(failure)
        with np.load(tmp_path / file) as kept:
            assert sorted(kept) == sorted(ROWS)
            for name, array in kept.items():
                np.testing.assert_array_equal(array, ROWS[name])
        (tmp_path / file).unlink()
    assert guard.failure(step_of(6)) is None and guard.failure(step_of(6, made=0.0, missing=1.0)) is None


class Checkpoints:
    def __init__(self) -> None:
        self.saved: list[tuple[int, float | None]] = []

    def best_loss(self) -> float | None:
        return 3.0

    def save(self, state, place, run, loss=None) -> None:
        assert place == {"place": int(state.step)}
        self.saved.append((int(state.step), loss))


def test_the_best_is_saved_whenever_an_evaluation_finds_it():
    """Every seventh step there is a checkpoint anyway; evaluations are at steps of their own."""
    losses = {2: 3.5, 4: 2.5, 6: 2.5, 8: 2.6, 10: 1.0, 14: 0.5}
    evaluation, checkpoints = types.SimpleNamespace(last=None), Checkpoints()
    report = Report(Display(20, 1, show=False), None, None, None, 2, 16, 20, 0.0)
    with Watch(60, print) as watch:
        saver = Saver(checkpoints, {}, 7, 0, None, evaluation, report, watch)
        for number in range(1, 16):
            step = step_of(number)
            if number in losses:
                evaluation.last = (number, losses[number])
            assert not saver.after(step)
        saver.save(step.state)
    assert checkpoints.saved == [(4, 2.5), (7, None), (10, 1.0), (14, 0.5), (15, None)]
