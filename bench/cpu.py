"""`python -m bench.cpu`: prefill and decode of the default model beside `transformers` on this machine's CPU.

Both sides run in turn and twice, each time in a process of its own, on the same weights and the same text: a prompt of
512 tokens, then greedy tokens with a KV cache, for one sequence and for eight. `transformers` runs as it is fastest
here: SDPA attention, inference mode, logits of the last position only, as many threads as cores. Rates are the best of
all repetitions, so that other work on the machine disturbs both sides least; read the ratios, not the rates.

With `--llama-python` naming an interpreter that has llama-cpp-python (see bench/llama_peer.py), int8 stands beside
llama.cpp on the same GGUF file, and beside `transformers` in bfloat16.

A mixture of experts stands beside a dense model with as many active parameters, one layer of each in turn: the shape is
Qwen1.5-MoE's, and one token or eight follow 511 in the cache.
"""

from __future__ import annotations

import dataclasses
import functools
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
EXPERT_DTYPES = ("float32", "bfloat16")
ROUNDS = 2
# A prompt is read so many times for each time that it is answered.
PREFILLS = 4


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prefill and decode rates of the default model beside transformers on this CPU, as a table of ratios."""

    repetitions: int = 3
    """Answers in each round, and a quarter of the prefills; the best counts."""
    dtypes: tuple[str, ...] = ("int8", "float32", "bfloat16")
    llama_python: Path | None = None
    """A Python interpreter with llama-cpp-python, compiled for this processor."""
    json: bool = False
    """Print the measurements as JSON."""


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "measure":  # in a process of its own, started below
        side, folder, dtype, repetitions = argv[1:]
        if side == "experts":
            print(json.dumps(_experts(dtype, int(repetitions))))
            return 0
        print(json.dumps((_ours if side == "ours" else _transformers)(folder, dtype, int(repetitions))))
        return 0
    options = tyro.cli(Arguments, args=argv, prog="python -m bench.cpu")
    from qwen_jax.weights.export import save_hf
    from qwen_jax.weights.open import open_checkpoint

    def measure(side: str, folder: str, dtype: str) -> dict[str, float]:
        command = [sys.executable, "-m", "bench.cpu", "measure", side, folder, dtype, str(options.repetitions)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    rates: dict[str, dict[str, dict[str, float]]] = {}
    layers = {dtype: measure("experts", "", dtype) for dtype in EXPERT_DTYPES if dtype in options.dtypes}
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "model")
        save_hf(open_checkpoint("default"), folder)
        for dtype in options.dtypes:
            is_int8 = dtype == "int8"
            peers = ["llama.cpp"] if is_int8 and options.llama_python else []
            for side in ["ours", "transformers", *peers] * ROUNDS:
                best = rates.setdefault(dtype, {}).setdefault(side, {})
                if side == "llama.cpp":
                    found = _llama(str(options.llama_python), options.repetitions)
                else:
                    theirs = is_int8 and side == "transformers"
                    source = "default" if is_int8 and side == "ours" else folder
                    found = measure(side, source, "bfloat16" if theirs else dtype)
                for name, rate in found.items():
                    _keep(best, name, rate)
    if options.json:
        print(json.dumps({"rates": rates, "milliseconds of a layer": layers}, indent=2))
    else:
        _print(rates)
        for dtype, taken in layers.items():
            for batch in BATCHES:
                experts, dense = (taken[f"{kind} batch {batch}"] for kind in ("experts", "dense"))
                print(
                    f"a layer, decode batch {batch}, {dtype}: experts {experts:.2f} ms, dense {dense:.2f} ms, ", end=""
                )
                print(f"ratio {experts / dense:.2f}")
    return 0


def _print(rates: dict[str, dict[str, dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", title=f"tok/s on {os.cpu_count()} cores", title_justify="left")
    table.add_column("measurement")
    for heading in ("dtype", "ours", "peer", "its rate", "ratio"):
        table.add_column(heading, justify="right")
    for dtype, sides in rates.items():
        for name, ours in sides["ours"].items():
            for peer, theirs in sides.items():
                if peer != "ours" and name in theirs:
                    row = (f"{ours:.1f}", peer, f"{theirs[name]:.1f}", f"{ours / theirs[name]:.2f}")
                    table.add_row(name, dtype, *row)
    Console().print(table)


def _prompt(tokenizer_ids: list[int]) -> list[int]:
    if len(tokenizer_ids) < PROMPT_TOKENS:
        tokenizer_ids = tokenizer_ids * -(-PROMPT_TOKENS // len(tokenizer_ids))
    return tokenizer_ids[:PROMPT_TOKENS]


def _text() -> str:
    from infer.parity_texts import TEXTS

    return "\n\n".join(TEXTS)


def _ours(folder: str, dtype: str, repetitions: int) -> dict[str, float]:
    from infer.qwen import load
    from infer.sampling import Sampling
    from infer.stream import Timing

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


def _llama(python: str, repetitions: int) -> dict[str, float]:
    from qwen_jax.weights.default_model import default_model
    from qwen_jax.weights.open import open_checkpoint

    prompt = _prompt(open_checkpoint("default").tokenizer().encode(_text()))
    script = Path(__file__).with_name("llama_peer.py")
    numbers = map(str, (NEW_TOKENS, repetitions, os.cpu_count()))
    command = [python, str(script), str(default_model()), *numbers]
    done = subprocess.run(command, input=json.dumps(prompt), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _experts(dtype: str, repetitions: int) -> dict[str, float]:
    """Milliseconds of one layer of Qwen1.5-MoE and of a dense one that multiplies by as many parameters."""
    import jax
    import jax.numpy as jnp

    from infer.decode import new_cache
    from infer.prepare import prepare
    from qwen_jax.backend import Backend
    from qwen_jax.model import Inputs, abstract, forward
    from qwen_jax.presets import load_preset

    moe = dataclasses.replace(load_preset("Qwen1.5-MoE-A2.7B"), num_layers=1, vocab_size=256)
    assert moe.moe is not None
    width = moe.moe.shared_intermediate_size + moe.moe.top_k * moe.moe.expert_intermediate_size
    dense = dataclasses.replace(moe, model_type="qwen2", moe=None, intermediate_size=width)
    steps = {}
    for name, config in (("experts", moe), ("dense", dense)):
        params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), abstract(config, jnp.dtype(dtype)))
        embedding = params["embed"]["embedding"]
        params["embed"]["embedding"] = jax.random.normal(jax.random.key(0), embedding.shape, embedding.dtype)
        if config.moe:
            router = params["layers"]["moe"]["router"]
            router["kernel"] = jax.random.normal(jax.random.key(1), router["kernel"].shape, router["kernel"].dtype)
        params = prepare(params, Backend.of(params), donate=True)
        step = jax.jit(lambda params, inputs, cache, c=config: forward(c, params, inputs, cache=cache).hidden)
        for batch in BATCHES:
            lengths = jnp.full(batch, PROMPT_TOKENS - 1, jnp.int32)
            cache = new_cache(config, params, lengths, PROMPT_TOKENS).replace(lengths=lengths)
            tokens = jnp.arange(batch, dtype=jnp.int32)[:, None]
            steps[f"{name} batch {batch}"] = functools.partial(step, params, Inputs.inference(tokens), cache)
    taken: dict[str, float] = {}
    for _ in range(8 * repetitions + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step().block_until_ready()
            taken[name] = min(taken.get(name, float("inf")), (time.perf_counter() - began) * 1e3)
    return taken


def _keep(rates: dict[str, float], name: str, rate: float) -> None:
    rates[name] = max(rate, rates.get(name, 0.0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
