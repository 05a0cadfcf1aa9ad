"""The model on a GPU: decoding of 7B, training steps beside PyTorch, cross-checks, and the default model's answer."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu import measure
from bench.gpu.measure import attempt, bandwidth, record

PROMPT = "Write a Python function that returns whether a number is prime."


def decode() -> None:
    """Greedy steps of 7B with random bfloat16 weights after 1,024 tokens, beside the bytes a step has to read."""
    from infer.decode import MAX_STEPS, prefill
    from infer.decode import decode as steps_of
    from qwen_jax.model import abstract, unstack
    from qwen_jax.presets import load_preset

    config = load_preset("qwen2.5-7b")
    length, batches = 1024, (1, 8, 64)
    if measure.rehearsing:
        config = dataclasses.replace(config, num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64)
        config = dataclasses.replace(config, intermediate_size=512, vocab_size=1024)
        length, batches = 64, (1, 2)
    ceiling = bandwidth()
    leaves, treedef = jax.tree.flatten(abstract(config, jnp.bfloat16))
    random = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    params = treedef.unflatten([random(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)])
    weight_bytes = sum(leaf.size * 2 for leaf in leaves) - config.vocab_size * config.hidden_size * 2  # of the lookup
    params = unstack(params)
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

        attempt(run, weights="bfloat16", sequences=batch)


def crosscheck() -> None:
    """Small random models in JAX on the GPU against PyTorch on the CPU: every limit of `qwen-jax crosscheck`."""
    from infer import parity
    from infer.parity_texts import TEXTS, folded
    from infer.torch_reference import variants, write_random

    chosen = {"qwen2": ("head_dim_64",), "qwen3": ("window",), "qwen2_moe": ("plain",)}
    if measure.rehearsing:
        chosen = {"qwen2": ("head_dim_64",)}
    for model_type, names in chosen.items():
        known = variants(model_type)  # pyright: ignore[reportArgumentType]
        for name in names:

            def run(variant: Any = known[name]) -> dict[str, Any]:
                with tempfile.TemporaryDirectory() as folder:
                    write_random(variant, Path(folder))
                    prompts = [folded(text, variant.config.vocab_size) for text in TEXTS]
                    report = parity.check(Path(folder), prompts, say=print, **_sizes())
                worst = max(
                    (m for m in report.measures if m.limit), key=lambda measured: measured.value / (measured.limit or 1)
                )
                broken = [m.name for m in report.measures if not m.holds]
                return {
                    "holds": report.holds,
                    "checks": len(report.measures),
                    "worst": f"{worst.name} {worst.value:.1e} of {worst.limit:.0e}",
                    "broken": ", ".join(broken[:4]),
                }

            attempt(run, model=f"{model_type} {name}")


def train() -> None:
    """A training step of 0.5B and of 1.5B, ours and transformers' under torch.compile, bfloat16 on float32 weights."""
    from bench.train import ON_GPU, Case, measure_side

    cases = {"20M": Case("20M", 1, 64)} if measure.rehearsing else ON_GPU
    for name, case in cases.items():
        for side in ("ours", "transformers"):
            # a process each: both want the whole memory
            attempt(
                lambda case=case, side=side: measure_side(side, case, repetitions=1 if measure.rehearsing else 4),
                model=name,
                batch=f"{case.rows} x {case.length}",
                side=side,
            )


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
