"""The default model, trained a little further and exported, is the same model in transformers."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import command, environment
from train.config import load_experiment
from train.data.sources import open_source

LENGTH = 256


def held_out(tokenizer, windows: int) -> np.ndarray:
    """[windows, LENGTH] ids of the text that the experiment is evaluated on."""
    config, _ = load_experiment("continue_demo")
    assert config.eval_data is not None
    source = open_source(config.eval_data.sources[0])
    ids = tokenizer.encode("\n".join(str(source[i]) for i in range(min(len(source), 20 * windows))))
    return np.asarray(ids[: windows * LENGTH]).reshape(windows, LENGTH)


def our_loss(model: str | Path, windows: int = 4) -> float:
    """Nats per token, in float32."""
    from infer.evaluate_perplexity import measure
    from infer.qwen import load

    qwen = load(model, dtype="float32", progress=False)
    return measure(qwen.config, qwen.params, held_out(qwen.tokenizer, windows).reshape(-1), LENGTH).nll


def their_loss(folder: Path, windows: int = 4) -> float:
    """The same by transformers."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(held_out(tokenizer, windows), dtype=torch.long)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(np.mean([float(model(row[None], labels=row[None]).loss) for row in ids]))


@pytest.mark.slow
def test_perplexity_falls_and_is_the_same_in_transformers(tmp_path: Path) -> None:
    out, exported = str(tmp_path / "out"), str(tmp_path / "hf")
    arguments = ["--steps", "4", "--eval-batches", "1", "--out", out, "--export", exported]
    trained = subprocess.run(
        command(Path("continue_demo"), *arguments), env=environment(tmp_path / "run"), stderr=subprocess.PIPE, text=True
    )
    assert trained.returncode == 0, trained.stderr
    ours, theirs, before = our_loss(exported), their_loss(tmp_path / "hf"), our_loss("default")
    assert math.isclose(ours, theirs, rel_tol=1e-5)
    assert ours < before
