"""A campaign of disks that fill at random bytes: nothing beyond the last checkpoint is lost, and no file is damaged.

QWEN_JAX_FULL_DISKS says how many (5 by default), QWEN_JAX_CAMPAIGN the folder of the campaign
(tests/train/campaign.py). Needs the right to mount a disk. Seeded: the n-th start always finds as much room.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.train.campaign import Campaign, Starter, check_files, checkpoints


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]).returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def leave(disk: Path, room: int) -> Path:
    """Fills the disk but for `room` bytes; returns what fills it."""
    filling = disk / "filling"
    with filling.open("wb") as file:
        free = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize - room)
    return filling


@pytest.mark.slow
def test_no_full_disk_costs_more_than_the_steps_since_the_last_checkpoint(tmp_path, disk):
    campaign = Campaign(
        Path(os.environ.get("QWEN_JAX_CAMPAIGN", tmp_path)) / "full-disk", ["full disks", "enough room"]
    )
    wanted = int(os.environ.get("QWEN_JAX_FULL_DISKS", 5))
    folder = disk / "out"
    with Starter(campaign.experiment) as starter:
        while campaign.tally["full disks"] < wanted:
            rng = np.random.default_rng(sum(campaign.tally.values()))
            before = checkpoints(folder)
            filling = leave(disk, int(rng.integers(0, campaign.size)))
            starter.start("--out", str(folder), "--export", f"{folder}-export")
            status, text = starter.wait(), starter.text
            filling.unlink()
            assert "Traceback" not in text, text
            if found := re.search(r"going on from the checkpoint of step (\d+)", text):
                assert [int(found[1])] == before[-1:], text
            assert not before or checkpoints(folder)[-1] >= before[-1], text
            check_files(folder)
            if status == 0:
                campaign.count("enough room")
                campaign.check_whole(folder)
            else:
                assert status == 75 and "no space left on device" in text.lower(), text
                campaign.count("full disks")
    print(campaign.tally)
