"""What the sections share: where results go, how a GPU is timed, and what its ceilings are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_section, _results = "", Path()
rehearsing = False


def start(section: str, results: Path, rehearse: bool) -> None:
    """Names the section that this process measures, and the file of results."""
    global _section, _results, rehearsing
    _section, _results, rehearsing = section, results, rehearse
    # "train" starts a process a side, whose memory this one must not take
    if not rehearse and section != "train" and jax.default_backend() != "gpu":
        raise SystemExit(
            "no NVIDIA GPU is visible to jax; install jax[cuda12] or jax[cuda13] on a machine that has one."
        )


def record(**values: Any) -> None:
    """Appends one row to the results."""
    with _results.open("a") as file:
        file.write(json.dumps({"section": _section} | values) + "\n")


def attempt(run: Callable[[], dict[str, Any]], **names: Any) -> dict[str, Any] | None:
    """Records names and the values of run(), or why there are none; one case that fails does not end the section."""
    try:
        values = run()
    except Exception as error:  # whatever a compiler or a library says
        record(**names, failed=f"{type(error).__name__}: {str(error).strip()[:300]}")
        return None
    record(**names, **values)
    return values


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Of one call() on the device: the best of three loops, each queued whole, long enough to hide the queueing."""
    wait(call())
    began = time.perf_counter()
    wait(call())
    once = time.perf_counter() - began
    count = 1 if rehearsing else max(3, min(200, int(0.08 / max(once, 1e-6))))
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(count):
            out = call()
        wait(out)
        best = min(best, (time.perf_counter() - began) / count)
    return best


def torch_wait(_: Any) -> None:
    """For `seconds` of a PyTorch call."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bandwidth() -> float:
    """Bytes per second of a copy on the device, those read and those written counted: the ceiling of decoding."""
    import jax.numpy as jnp

    x = jnp.ones((1 << 12) if rehearsing else (1 << 30), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds(lambda: copy(x))
