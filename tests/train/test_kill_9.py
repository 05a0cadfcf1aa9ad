"""A campaign of kill -9 in every phase of a run: nothing beyond the last checkpoint is lost, and no file is damaged.

QWEN_JAX_KILLS says how many (14 by default), QWEN_JAX_CAMPAIGN the folder in which the campaign goes on where it was
cut off, and keeps its tally in tally.json. Seeded: the n-th kill is always of the same phase, after the same delay.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import final_weights, losses, make_run, run, start

# phase -> seconds after its beginning, at most
PHASES = {"start": 4.0, "compile": 2.0, "step": 0.1, "save": 0.05, "metrics": 0.1, "evaluation": 0.1, "export": 0.5}
SETTINGS = """
import dataclasses
small = dataclasses.replace(data, epochs=1)
config = dataclasses.replace(config, eval_data=small, eval_every=4, eval_batches=4)
"""


class Run:
    """A run that is to be killed in a phase."""

    def __init__(self, experiment: Path, folder: Path) -> None:
        self.folder = folder
        self.process = start(experiment, "--out", str(folder), "--export", str(folder) + "-export")
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)

    def begun(self, phase: str) -> bool:
        text = "".join(self.lines)
        if phase == "start":
            return True
        if phase == "compile":
            return "parameters on" in text
        if phase == "step":
            return re.search(r"^step \d+/", text, re.M) is not None
        if phase == "save":
            return any((self.folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        if phase == "metrics":  # which are rewritten right before the first step
            return "going on from" in text or "compiled in" in text
        if phase == "evaluation":
            return re.search(r"^step (4|8|12)/", text, re.M) is not None
        return any(self.folder.glob("final*"))

    def kill_in(self, phase: str, delay: float) -> bool:
        """Whether it was killed; else it has ended well before."""
        while not self.begun(phase) and self.process.poll() is None:
            time.sleep(0.001)
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.001)
        self.process.kill()
        status = self.process.wait()
        self._reader.join()
        assert status in (-9, 0), "".join(self.lines)
        return status == -9

    @property
    def went_on_from(self) -> int | None:
        """Step, 0 for a run that began anew, None where it was killed before it was known."""
        text = "".join(self.lines)
        if found := re.search(r"going on from the checkpoint of step (\d+)", text):
            return int(found[1])
        return 0 if re.search(r"^step 1/", text, re.M) else None


def checkpoints(folder: Path) -> list[int]:
    """Steps of those that are whole."""
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


@pytest.mark.slow
def test_no_kill_costs_more_than_the_steps_since_the_last_checkpoint(tmp_path):
    campaign = Path(os.environ.get("QWEN_JAX_CAMPAIGN", tmp_path))
    wanted = int(os.environ.get("QWEN_JAX_KILLS", 2 * len(PHASES)))
    tally_file, reference = campaign / "tally.json", campaign / "out"
    experiment = campaign / "experiment.py"
    if not tally_file.exists():
        campaign.mkdir(exist_ok=True)
        make_run(campaign)
        experiment.write_text(experiment.read_text() + SETTINGS)
        status, text = run(experiment, "--export", str(reference) + "-export")
        assert status == 0, text
        tally_file.write_text(json.dumps({"kills": dict.fromkeys(PHASES, 0), "whole runs": 0}))
    tally = json.loads(tally_file.read_bytes())
    expected, weights = losses(reference), final_weights(reference)
    folder = campaign / "killed"
    while (number := sum(tally["kills"].values())) < wanted:
        rng = np.random.default_rng(number)
        phase = [*PHASES][number % len(PHASES)]
        before = checkpoints(folder)
        attempt = Run(experiment, folder)
        killed = attempt.kill_in(phase, rng.uniform(0, PHASES[phase]))
        if attempt.went_on_from is not None:
            assert attempt.went_on_from == (before[-1] if before else 0), "".join(attempt.lines)
        after = checkpoints(folder)
        assert not before or after[-1] >= before[-1], (phase, before, after)
        check_files(folder)
        if killed:
            tally["kills"][phase] += 1
        else:  # it came to its end
            assert losses(folder) == expected
            ours = final_weights(folder)
            for path, leaf in weights.items():
                np.testing.assert_array_equal(ours[path], leaf)
            exported = [Path(f"{out}-export") for out in (folder, reference)]
            for file in exported[1].iterdir():
                assert filecmp.cmp(file, exported[0] / file.name, shallow=False), file.name
            shutil.rmtree(exported[0])
            shutil.rmtree(folder)
            tally["whole runs"] += 1
        tally_file.write_text(json.dumps(tally))
    print(json.dumps(tally))
