"""The model on a GPU: decoding of 7B, training steps beside PyTorch, cross-checks, and the default model's answer."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu import measure
from bench.gpu.measure import attempt, bandwidth, record
from qwen_jax.config import ModelConfig
from qwen_jax.model import Params

PROMPT = "Write a Python function that returns whether a number is prime."


def decode() -> None:
    """Greedy steps of 7B with random weights after 1,024 tokens, beside the bytes a step has to read."""
    for kind in ("bfloat16", "int4", "int8"):  # int8 last: XLA tunes its products for a minute
        _decode(kind)


def _decode(kind: str) -> None:
    from bench.gpu.kernels import stored_bytes
    from infer.decode import MAX_STEPS, prefill
    from infer.decode import decode as steps_of
    from qwen_jax.model import unstack
    from qwen_jax.presets import load_preset

    config = load_preset("qwen2.5-7b")
    length, batches = 1024, (1, 8, 64)
    if measure.rehearsing:
        config = dataclasses.replace(config, num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64)
        config = dataclasses.replace(config, intermediate_size=512, vocab_size=1024)
        length, batches = 64, (1,)
    ceiling = bandwidth()
    params = unstack(_random(config, kind))
    weight_bytes = stored_bytes(params) - config.vocab_size * config.hidden_size * 2  # of the lookup
    cache_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    fixed: Any = {"config": config, "vocab_size": config.vocab_size, "num_top": 0}
    never = jnp.asarray([-1], jnp.int32)
    for batch in batches:

        def run(batch: int = batch) -> dict[str, Any]:
            tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, config.vocab_size, jnp.int32)
            lengths, limits = jnp.full(batch, length, jnp.int32), jnp.full(batch, 1 << 20, jnp.int32)
            # prefill twice: the first compiles
            for _ in range(2):
                began = time.perf_counter()
                state, produced = prefill(
                    params, tokens, lengths, limits, None, never, capacity=length + 8 * MAX_STEPS, **fixed
                )
                jax.block_until_ready(produced)
                prefilled = time.perf_counter() - began
            best = float("inf")
            for _ in range(4):
                began = time.perf_counter()
                state, produced, taken = steps_of(params, state, jnp.int32(MAX_STEPS), never, **fixed)
                jax.block_until_ready(produced)
                best = min(best, (time.perf_counter() - began) / int(taken))
            moved = weight_bytes + batch * length * cache_bytes
            return {
                "prefill tok/s": batch * length / prefilled,
                "ms a step": best * 1e3,
                "tok/s": batch / best,
                "of copy's bytes/s": moved / best / ceiling,
                "peak GiB": _peak_gib(),
            }

        attempt(run, weights=kind, sequences=batch)


def _random(config: ModelConfig, kind: str) -> Params:
    """In bfloat16; the layers' matrices in int8 with a scale for each output, or in int4 in groups of 128."""
    from qwen_jax.leaves import Grouped, Int8
    from qwen_jax.weights.load import put_leaf
    from qwen_jax.weights.names import leaves

    def matrix(key: jax.Array, front: int, row_axes: int, shape: tuple[int, ...]) -> Any:
        rows = shape[: front + row_axes]
        if kind == "int8":
            return Int8(jax.random.randint(key, shape, -127, 128, jnp.int8), jnp.full(rows, 3e-4, jnp.bfloat16))
        groups = math.prod(shape[len(rows) :]) // 128
        values = jax.random.randint(key, (*rows, groups, 128), -7, 8, jnp.int8).astype(jnp.int4)
        scale = jnp.full((*rows, groups), 5e-3, jnp.float16)
        return Grouped(values, scale, inner=shape[len(rows) + 1 :], float_dtype=jnp.dtype(jnp.bfloat16))

    normal = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    coded = jax.jit(matrix, static_argnums=(1, 2, 3))
    params: dict[str, Any] = {}
    for number, leaf in enumerate(leaves(config, "hf")):
        key, front = jax.random.key(number), len(leaf.shape) - len(leaf.unit)
        if kind != "bfloat16" and front and len(leaf.unit) > leaf.row_axes:
            new = coded(key, front, leaf.row_axes, leaf.shape)
        else:
            new = normal(key, leaf.shape)
        put_leaf(params, leaf.path, new)
    return params


def crosscheck() -> None:
    """Small random models in JAX on the GPU against PyTorch on the CPU: every limit of `qwen-jax crosscheck`.

    In threads: most of the time goes to compiling.
    """
    from transformers import AutoModelForCausalLM  # which threads cannot import at the same time  # noqa: F401

    from infer.torch_reference import variants

    chosen = {"qwen2": "head_dim_64", "qwen3": "window", "qwen2_moe": "plain"}
    if measure.rehearsing:
        chosen = {"qwen2": "head_dim_64"}
    with ThreadPoolExecutor() as pool:
        for model_type, name in chosen.items():
            run = functools.partial(_checked, variants(model_type)[name])  # pyright: ignore[reportArgumentType]
            pool.submit(attempt, run, model=f"{model_type} {name}")


def _checked(variant: Any) -> dict[str, Any]:
    from infer import parity
    from infer.parity_texts import TEXTS, folded
    from infer.torch_reference import write_random

    with tempfile.TemporaryDirectory() as folder:
        write_random(variant, Path(folder))
        prompts = [folded(text, variant.config.vocab_size) for text in TEXTS]
        report = parity.check(Path(folder), prompts, say=print, **_sizes())
    worst = max((m for m in report.measures if m.limit), key=lambda measured: measured.value / (measured.limit or 1))
    broken = [m.name for m in report.measures if not m.holds]
    return {
        "holds": report.holds,
        "checks": len(report.measures),
        "worst": f"{worst.name} {worst.value:.1e} of {worst.limit:.0e}",
        "broken": ", ".join(broken[:4]),
    }


def train() -> None:
    """A training step of 0.5B, 1.5B and 7B by LoRA, ours and transformers' under torch.compile, in bfloat16."""
    from bench.train import ON_GPU, Case, measure_side

    cases = {"20M": Case("20M", 1, 64), "20M, LoRA": Case("20M", 1, 64, rank=4)} if measure.rehearsing else ON_GPU
    for name, case in cases.items():
        for side in ("ours", "transformers"):
            # a process each: both want the whole memory
            attempt(
                lambda case=case, side=side: measure_side(side, case, repetitions=1 if measure.rehearsing else 4),
                model=name,
                batch=f"{case.rows} x {case.length}",
                side=side,
            )


def profile() -> None:
    """The kernels that a training step of 0.5B spends its time in."""
    from bench.train import ON_GPU, Case, our_step

    case = Case("20M", 1, 64) if measure.rehearsing else ON_GPU["0.5B"]
    step = our_step(case)
    step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(2):
                step()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
    spent: dict[str, float] = {}
    for plane in data.planes:
        if "GPU" in plane.name:
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        spent[event.name] = spent.get(event.name, 0) + event.duration_ns / 2e6
    record(kernel="all", ms=sum(spent.values()))
    for name, milliseconds in sorted(spent.items(), key=lambda item: -item[1])[:40]:
        record(kernel=name[:90], ms=milliseconds)


def default_model() -> None:
    """The real weights, where they are at hand: an answer, its speed, and every check of `qwen-jax crosscheck`."""
    from infer import parity
    from infer.parity_texts import TEXTS
    from infer.qwen import load
    from qwen_jax.errors import InputError
    from qwen_jax.weights.checkpoint import TensorCheckpoint
    from qwen_jax.weights.open import open_checkpoint

    try:
        checkpoint = open_checkpoint("default")
    except InputError as error:
        record(model="default", skipped=str(error)[:200])
        return
    qwen = load("default", progress=False)
    record(model="default", loaded=True)
    tokens = 8 if measure.rehearsing else 160
    for _ in range(2):  # the first compiles
        stream = qwen.stream([qwen.chat_prompt(PROMPT)], qwen.sampling(temperature=0), max_tokens=tokens)
        text = "".join(piece for _, piece in stream)
    record(model="default", answer=text, **{"decode tok/s": stream.timing.decode_rate})
    assert isinstance(checkpoint, TensorCheckpoint)
    prompts = qwen.tokenizer.encode_batch(TEXTS)
    report = parity.check(checkpoint.source, prompts, say=print, **_sizes())
    broken = [m.name for m in report.measures if not m.holds]
    logits = next(m.value for m in report.measures if m.name == "logits")
    record(model="default", holds=report.holds, checks=len(report.measures), logits=logits, broken=", ".join(broken))


def _sizes() -> Any:
    """Of a cross-check."""
    if measure.rehearsing:
        return {"num_tokens": 32, "gradient_tokens": 8, "greedy_tokens": 0}
    return {"greedy_tokens": 64}


def _peak_gib() -> float:
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else float("nan")
