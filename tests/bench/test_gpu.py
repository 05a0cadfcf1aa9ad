"""`bench.gpu` cannot fail on a GPU for a silly reason: every section runs on a CPU at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.__main__ import SECTIONS, main


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(tmp_path), "--sections", *SECTIONS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert run.returncode == 0, f"{rows}\n{run.stderr[-2000:]}"
    assert {row["section"] for row in rows} == set(SECTIONS)


def test_refuses_unknown_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out"), "--sections", "attention", "atention"]) == 2
    assert "there is no section atention" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
