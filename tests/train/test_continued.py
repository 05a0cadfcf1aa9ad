"""The default model, trained a little further and exported, is the same model in transformers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from train.config import load_experiment
from train.data.sources import open_source
from train.trainer import train

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
def test_perplexity_falls_and_is_the_same_in_transformers(tmp_path):
    config, _ = load_experiment("continue_demo")
    config = dataclasses.replace(config, steps=4, eval_data=None, out=tmp_path / "out", export=tmp_path / "hf")
    assert train(config) == 0
    ours, theirs, before = our_loss(tmp_path / "hf"), their_loss(tmp_path / "hf"), our_loss("default")
    assert math.isclose(ours, theirs, rel_tol=1e-5)
    assert ours < before
