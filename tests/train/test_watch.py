"""A run that does nothing any more: after a signal it ends, and before it is spoken of."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from train import watch
from train.watch import Watch

HUNG = """
import signal, sys, time
from train.watch import Watch

with Watch(float(sys.argv[1]), print) as watch:
    watch.enter("step", 3)
    print("ready", flush=True)
    if sys.argv[2] == "hung":
        # as in a wait for a device or another process, the main thread runs no handler
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        time.sleep(1000)
    for number in range(4, 40):  # phases that end
        time.sleep(0.1)
        watch.enter("step", number)
    print("requested", watch.requested.name, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_hung_run_ends_within_its_grace(number):
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG, "1", "hung"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        began = time.monotonic()
        _, text = process.communicate(timeout=60)
        assert 0.5 < time.monotonic() - began < 30
    assert process.returncode == 75
    assert "asked to stop, but step 3 has not ended within 1 s" in text and "Traceback" not in text


def test_a_run_whose_steps_end_stops_by_itself():
    process = subprocess.Popen([sys.executable, "-c", HUNG, "1", "alive"], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "requested SIGTERM\n"
    assert process.returncode == 0


def test_a_long_phase_is_spoken_of(monkeypatch):
    monkeypatch.setattr(watch, "_NEVER_BEFORE", 0.5)
    said: list[str] = []
    with Watch(60, said.append) as watching:
        for number in range(5):
            watching.enter("step", number)
            time.sleep(0.05)
        time.sleep(3)
        watching.enter("evaluation", "after step 5")
    assert 1 <= len(said) <= 3
    assert said[0].startswith("step 4 goes on for ") and "usually it takes 0.1 s" in said[0]
