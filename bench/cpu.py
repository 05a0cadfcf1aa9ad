"""`python -m bench.cpu`: prefill and decode of the default model beside `transformers` on this machine's CPU.

Both sides run in turn and twice, each time in a process of its own, on the same weights and the same text: a prompt of
512 tokens, then greedy tokens with a KV cache, for one sequence and for eight. `transformers` runs as it is fastest
here: SDPA attention, inference mode, logits of the last position only, as many threads as cores. Rates are the best of
all repetitions, so that other work on the machine disturbs both sides least; read the ratios, not the rates.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

PROMPT_TOKENS = 512
NEW_TOKENS = 48
BATCHES = (1, 8)
DTYPES = ("float32", "bfloat16")
ROUNDS = 2
# A prompt is read so many times for each time that it is answered.
PREFILLS = 4


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prefill and decode rates of the default model beside transformers on this CPU, as a table of ratios."""

    repetitions: int = 3
    """Answers in each round, and a quarter of the prefills; the best counts."""
    json: bool = False
    """Print the measurements as JSON."""


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "measure":  # in a process of its own, started below
        side, folder, dtype, repetitions = argv[1:]
        print(json.dumps((_ours if side == "ours" else _transformers)(folder, dtype, int(repetitions))))
        return 0
    options = tyro.cli(Arguments, args=argv, prog="python -m bench.cpu")
    from qwen_jax.weights.export import save_hf
    from qwen_jax.weights.open import open_checkpoint

    rates: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "model")
        save_hf(open_checkpoint("default"), folder)
        for dtype in DTYPES:
            for side in ("ours", "transformers") * ROUNDS:
                command = [sys.executable, "-m", "bench.cpu", "measure", side, folder, dtype, str(options.repetitions)]
                environment = os.environ | {"JAX_PLATFORMS": "cpu"}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                best = rates.setdefault(dtype, {}).setdefault(side, {})
                for name, rate in json.loads(done.stdout.splitlines()[-1]).items():
                    _keep(best, name, rate)
    if options.json:
        print(json.dumps(rates, indent=2))
    else:
        _print(rates)
    return 0


def _print(rates: dict[str, dict[str, dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", title=f"tok/s on {os.cpu_count()} cores", title_justify="left")
    table.add_column("measurement")
    for heading in ("dtype", "ours", "transformers", "ratio"):
        table.add_column(heading, justify="right")
    for dtype, sides in rates.items():
        for name, ours in sides["ours"].items():
            theirs = sides["transformers"][name]
            table.add_row(name, dtype, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}")
    Console().print(table)


def _prompt(tokenizer_ids: list[int]) -> list[int]:
    if len(tokenizer_ids) < PROMPT_TOKENS:
        tokenizer_ids = tokenizer_ids * -(-PROMPT_TOKENS // len(tokenizer_ids))
    return tokenizer_ids[:PROMPT_TOKENS]


def _text() -> str:
    from infer.parity_texts import TEXTS

    return "\n\n".join(TEXTS)


def _ours(folder: str, dtype: str, repetitions: int) -> dict[str, float]:
    from infer.qwen import Timing, load
    from infer.sampling import Sampling

    qwen = load(folder, dtype=dtype, progress=False)
    prompt = _prompt(qwen.tokenizer.encode(_text()))
    rates: dict[str, float] = {}

    def answer(batch: int, tokens: int) -> Timing:
        stream = qwen.stream([prompt] * batch, Sampling(), max_tokens=tokens, steps=16)
        for _ in stream:
            pass
        return stream.timing

    for _ in range(PREFILLS * repetitions + 1):  # the first compiles
        _keep(rates, f"prefill {PROMPT_TOKENS}", answer(1, 1).prefill_rate)
    for batch in BATCHES:
        for _ in range(repetitions + 1):
            _keep(rates, f"decode batch {batch}", answer(batch, NEW_TOKENS).decode_rate)
    return rates


def _transformers(folder: str, dtype: str, repetitions: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    prompt = _prompt(AutoTokenizer.from_pretrained(folder)(_text())["input_ids"])
    rates: dict[str, float] = {}

    def answer(batch: int, num_tokens: int) -> tuple[float, float]:
        """Seconds of prefill and of decoding."""
        cache = DynamicCache(config=model.config)
        tokens = torch.tensor([prompt] * batch)
        began = time.perf_counter()
        # by place: transformers 5.24 renamed the cache from past_key_values
        logits = model(tokens, None, None, cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        prefilled = time.perf_counter()
        for _ in range(num_tokens - 1):
            token = model(token, None, None, cache).logits[:, -1].argmax(-1, keepdim=True)
        return prefilled - began, time.perf_counter() - prefilled

    with torch.inference_mode():
        for _ in range(PREFILLS * repetitions + 1):
            _keep(rates, f"prefill {PROMPT_TOKENS}", PROMPT_TOKENS / answer(1, 1)[0])
        for batch in BATCHES:
            for _ in range(repetitions + 1):
                _keep(rates, f"decode batch {batch}", batch * (NEW_TOKENS - 1) / answer(batch, NEW_TOKENS)[1])
    return rates


def _keep(rates: dict[str, float], name: str, rate: float) -> None:
    rates[name] = max(rate, rates.get(name, 0.0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
