"""`python -m bench.train`: a training step of ours beside transformers + PyTorch on the same model, batch and dtype.

Each side runs in a process of its own: random weights, forward, backward, clipping and AdamW, float32 weights and
moments, or LoRA over frozen weights. On a CPU both compute in float32, with as many threads as cores, PyTorch with SDPA
attention and its fused AdamW. On a GPU both compute in bfloat16 from float32 weights (PyTorch by autocast and
torch.compile, which is how it is fastest there), on rows of 4096 tokens, and tokens per second and model FLOPs
utilisation are printed too. Times are the best of the repetitions; peak memory is the process's, or the GPU's. Read the
ratios.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from qwen_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch."""

    model: str
    rows: int
    length: int
    rank: int = 0
    """Of LoRA over every matrix, on weights frozen in bfloat16; 0 trains the weights."""


ON_CPU = {"20M": Case("20M", 4, 256), "0.5B": Case("qwen2.5-0.5b", 1, 256)}
# rows that leave PyTorch, whose logits are held whole, within 80 GB
ON_GPU = {
    "0.5B": Case("qwen2.5-0.5b", 4, 4096),
    "1.5B": Case("qwen2.5-1.5b", 2, 4096),
    "7B, LoRA": Case("qwen2.5-7b", 1, 4096, rank=16),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time and peak memory of a training step beside transformers + PyTorch, as a table of ratios."""

    repetitions: int = 5
    """Steps that are timed; the fastest counts."""
    cases: tuple[str, ...] = ()
    """Some of the cases only, such as 20M."""
    json: bool = False
    """Print the measurements as JSON."""


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "measure":  # in a process of its own, started below
        side, case, repetitions = argv[1], Case(**json.loads(argv[2])), int(argv[3])
        print(json.dumps((_ours if side == "ours" else _transformers)(case, repetitions)))
        return 0
    options = tyro.cli(Arguments, args=list(argv), prog="python -m bench.train")
    cases = ON_GPU if _has_gpu() else ON_CPU
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.cases or cases:
        for side in ("ours", "transformers"):
            results.setdefault(name, {})[side] = measure_side(side, cases[name], options.repetitions)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        _print(results, cases)
    return 0


def measure_side(side: str, case: Case, repetitions: int) -> dict[str, float]:
    """A side's figures by name, measured in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "bench.train",
        "measure",
        side,
        json.dumps(dataclasses.asdict(case)),
        str(repetitions),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _print(results: dict[str, dict[str, dict[str, float]]], cases: dict[str, Case]) -> None:
    from rich.console import Console
    from rich.table import Table

    where = "GPU, bfloat16" if _has_gpu() else f"{os.cpu_count()} cores, float32"
    table = Table(box=None, header_style="bold", title=f"a training step on {where}", title_justify="left")
    for heading in ("model", "batch", "measurement", "ours", "transformers", "ratio"):
        table.add_column(heading, justify="left" if heading in ("model", "batch", "measurement") else "right")
    for name, sides in results.items():
        batch = f"{cases[name].rows} x {cases[name].length}"
        for measurement, ours in sides["ours"].items():
            theirs = sides["transformers"][measurement]
            table.add_row(name, batch, measurement, f"{ours:.4g}", f"{theirs:.4g}", f"{theirs / ours:.2f}")
    Console().print(table)
    print("ratio: theirs / ours, so above 1 ours takes less; of tokens per second and MFU, below 1 ours is faster")


def architecture(name: str) -> ModelConfig:
    """A released model's, or one of about 20M parameters in the proportions of Qwen2.5-0.5B with a small vocabulary."""
    from qwen_jax.presets import load_preset

    if name != "20M":
        return load_preset(name)
    return dataclasses.replace(
        load_preset("qwen2.5-0.5b"),
        vocab_size=8192,
        hidden_size=448,
        num_layers=8,
        num_heads=7,
        num_kv_heads=1,
        intermediate_size=1216,
    )


def _report(case: Case, seconds: float, peak_bytes: float) -> dict[str, float]:
    result = {"seconds": seconds, "peak memory, GiB": peak_bytes / 2**30}
    if _has_gpu():
        from qwen_jax.flops import utilisation

        result["tok/s"] = case.rows * case.length / seconds
        # by an adapter fewer FLOPs are needed than the formula counts
        mfu = None if case.rank else utilisation(architecture(case.model), case.rows, case.length, seconds)
        if mfu is not None:
            result["MFU"] = mfu
    return result


def _tokens(case: Case, vocab_size: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab_size, (case.rows, case.length + 1))


def _ours(case: Case, repetitions: int) -> dict[str, float]:
    from infer.arguments import peak_memory_gib

    step = our_step(case)
    best = float("inf")
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - began)
    return _report(case, best, peak_memory_gib() * 2**30)


def our_step(case: Case) -> Callable[[], float]:
    """A compiled step, called for its loss: its state is kept from call to call."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qwen_jax.model import init
    from qwen_jax.sharding import MeshConfig, make_mesh
    from train.adapter import AdapterConfig, adapted
    from train.batch import TokenBatch
    from train.loop import signals
    from train.objectives.pretrain import Pretrain
    from train.optimizer import OptimizerConfig
    from train.state import init_roles, new_state, split
    from train.step import StepConfig, abstract_arguments, jit_train_step

    model = architecture(case.model)
    on_cpu = jax.default_backend() == "cpu"
    step = StepConfig("float32" if on_cpu else "bfloat16", remat="minimal")
    objective, optimizer = Pretrain(), OptimizerConfig(warmup_steps=0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tokens = _tokens(case, model.vocab_size)
    batch = TokenBatch(
        tokens=tokens[:, :-1].astype(np.int32),
        targets=tokens[:, 1:].astype(np.int32),
        positions=np.tile(np.arange(case.length, dtype=np.int32), (case.rows, 1)),
        segment_ids=np.ones((case.rows, case.length), np.int32),
        loss_mask=np.ones((case.rows, case.length), np.float32),
    )
    with jax.set_mesh(mesh):
        roles = frozen = None
        if case.rank:
            base = jax.jit(lambda key: init(model, key, jnp.bfloat16))(jax.random.key(0))
            roles = {"policy": adapted(AdapterConfig(rank=case.rank), model, base, 0)}
            frozen = split(objective, optimizer, roles)[1]
        arguments = abstract_arguments(model, objective, optimizer, mesh, case.rows, case.length, roles)
        compiled = jit_train_step(model, objective, optimizer, step, 1000, mesh, arguments).lower(*arguments).compile()
        layout = jax.tree.map(lambda leaf: leaf.sharding, arguments)

        def start(roles: Any) -> Any:
            return new_state(split(objective, optimizer, roles)[0], optimizer)

        if roles is None:
            new = jax.jit(lambda key: start(init_roles(model, objective, key)), out_shardings=layout[0])
            state, frozen = new(jax.random.key(0)), arguments[1]
        else:
            state = jax.device_put(start(roles), layout[0])
        batch = jax.device_put(batch, layout[2])
    held = {"state": state, "turn": 0}

    def call() -> float:
        with jax.set_mesh(mesh):
            here = signals(mesh, held["turn"], missing=False, stop=False)
            held["state"], metrics = compiled(held["state"], frozen, batch, here)
        held["turn"] += 1
        return float(metrics["loss"])

    return call


def _transformers(case: Case, repetitions: int) -> dict[str, float]:
    import torch
    import transformers

    from infer.arguments import peak_memory_gib

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("high")
    ours = architecture(case.model)
    fields = ours.to_hf()
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    dtype = torch.bfloat16 if case.rank and device == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if case.rank:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=case.rank, target_modules="all-linear"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.tensor(_tokens(case, ours.vocab_size), device=device)
    forward = torch.compile(model) if device == "cuda" else model
    best = float("inf")
    for _ in range(repetitions + (4 if device == "cuda" else 1)):
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            logits = forward(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        best = min(best, time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory_gib() * 2**30
    return _report(case, best, peak)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
