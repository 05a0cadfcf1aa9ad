"""The default model's greedy answers through an engine are those of `transformers`, whatever happens beside them."""

from pathlib import Path

import numpy as np
import pytest

from infer.engine import Engine
from infer.parity_texts import TEXTS
from infer.qwen import load
from infer.sampling import Sampling
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.open import open_checkpoint

TOKENS = 48


@pytest.mark.slow
def test_twenty_mixed_prompts(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    save_hf(open_checkpoint("default"), tmp_path / "model")
    qwen = load(tmp_path / "model", dtype="float32", progress=False)  # the folder's weights are rounded to bfloat16
    text = qwen.tokenizer.encode("\n\n".join(TEXTS))
    rng = np.random.default_rng(0)
    sizes = [1, 3, 17, 64, 65, 127, 128, 129, 300, 700, *rng.integers(5, 200, 8).tolist()]
    starts = rng.integers(0, len(text) - 701, len(sizes)).tolist()
    prompts = [text[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    prompts += [prompts[9][:600] + prompts[4], prompts[8][:200] + prompts[3]]  # which begin like others

    # pages for fewer than want to run, so that the youngest give way
    engine, greedy = Engine(qwen, rows=8, page=16, piece=256, num_pages=60), Sampling()
    requests = [engine.add(prompt, greedy, max_tokens=TOKENS) for prompt in prompts[:12]]
    while not engine.is_idle:
        engine.step()
        if len(requests) < len(prompts) and engine.counts.steps % 3 == 0:
            requests.append(engine.add(prompts[len(requests)], greedy, max_tokens=TOKENS))
        if engine.counts.steps == 5:
            engine.cancel(engine.add(prompts[0] * 40, greedy, max_tokens=TOKENS))
    engine.pool.check()
    assert engine.counts.preemptions and engine.counts.cached_tokens

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    # the checkpoint's own asks for a repetition penalty
    model.generation_config = GenerationConfig(eos_token_id=list(requests[0].asked.stop_ids), pad_token_id=0)
    with torch.inference_mode():
        for prompt, request in zip(prompts, requests, strict=True):
            whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS)
            assert request.answer.tokens == whole[0, len(prompt) :].tolist()
