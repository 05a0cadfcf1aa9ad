"""A campaign of kill -9 in every phase of a run: nothing beyond the last checkpoint is lost, and no file is damaged.

QWEN_JAX_KILLS says how many (14 by default), QWEN_JAX_CAMPAIGN the folder of the campaign (tests/train/campaign.py).
Seeded: the n-th kill is always of the same phase, after the same delay.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.campaign import Campaign, Starter, check_files, checkpoints

# phase -> seconds after its beginning, at most
PHASES = {"start": 4.0, "compile": 2.0, "step": 0.1, "save": 0.05, "metrics": 0.1, "evaluation": 0.1, "export": 0.5}


def begun(phase: str, text: str, folder: Path) -> bool:
    """Whether a run that has written `text` is in the phase, or beyond."""
    match phase:
        case "start":
            return True
        case "compile":
            return "parameters on" in text
        case "step":
            return re.search(r"^step \d+/", text, re.M) is not None
        case "save":
            return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        case "metrics":  # which are rewritten right before the first step
            return "going on from" in text or "compiled in" in text
        case "evaluation":
            return re.search(r"^step (4|8|12)/", text, re.M) is not None
        case _:
            return any(folder.glob("final*"))


def went_on_from(text: str) -> int | None:
    """Step, 0 for a run that began anew, None where it was killed before it was known."""
    if found := re.search(r"going on from the checkpoint of step (\d+)", text):
        return int(found[1])
    return 0 if re.search(r"^step 1/", text, re.M) else None


@pytest.mark.slow
def test_no_kill_costs_more_than_the_steps_since_the_last_checkpoint(tmp_path):
    campaign = Campaign(Path(os.environ.get("QWEN_JAX_CAMPAIGN", tmp_path)) / "kill-9", [*PHASES])
    wanted = int(os.environ.get("QWEN_JAX_KILLS", 2 * len(PHASES)))
    folder = campaign.experiment.parent / "killed"
    with Starter(campaign.experiment) as starter:
        while (number := sum(campaign.tally[phase] for phase in PHASES)) < wanted:
            rng = np.random.default_rng(number)
            phase = [*PHASES][number % len(PHASES)]
            before = checkpoints(folder)
            # nothing is compiled yet where compiling is killed, and what that leaves is what later runs find
            programs = f"compiled-{campaign.tally['compile'] + (phase == 'compile')}"
            starter.start("--out", str(folder), "--export", f"{folder}-export", programs=programs)
            while not begun(phase, starter.text, folder) and starter.poll() is None:
                time.sleep(0.005)
            deadline = time.monotonic() + rng.uniform(0, PHASES[phase])
            while time.monotonic() < deadline and starter.poll() is None:
                time.sleep(0.005)
            status, text = starter.kill(), starter.text
            assert status in (-signal.SIGKILL, 0) and "Traceback" not in text, text
            if (step := went_on_from(text)) is not None:
                assert step == (before[-1] if before else 0), text
            after = checkpoints(folder)
            assert not before or after[-1] >= before[-1], (phase, before, after)
            check_files(folder)
            if status:
                campaign.count(phase)
            else:
                campaign.check_whole(folder)
    print(campaign.tally)
