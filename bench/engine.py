"""`python -m bench.engine`: an engine beside `generate` in batches of as many rows, on requests of unequal lengths.

Answers are greedy, of the default model, of 8 to 96 tokens. `generate` waits for the longest of a batch, an engine
lets the next request in. Both read and answer the same, twice in turn, the first time to compile. Read the ratio.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tokens per second of an engine and of batches, and their ratio."""

    model: str = "default"
    requests: int = 24
    rows: int = 4
    dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    prompt_tokens: int = 128
    """At most; the shortest has a quarter of it."""


def main(argv: Sequence[str]) -> int:
    from infer.engine import Engine
    from infer.qwen import load

    options = tyro.cli(Arguments, args=list(argv), prog="python -m bench.engine")
    qwen = load(options.model, dtype=options.dtype)
    rng = np.random.default_rng(0)
    text = qwen.tokenizer.encode(" ".join(map(str, range(4000))))
    sizes = rng.integers(options.prompt_tokens // 4, options.prompt_tokens + 1, options.requests)
    limits = [int(limit) for limit in rng.integers(8, 97, options.requests)]
    greedy = qwen.sampling(temperature=0.0, min_tokens=max(limits))
    engine = Engine(qwen, rows=options.rows)

    def prompts(turn: int) -> list[list[int]]:
        """Other ones each time, so that an engine finds none of them in its pages."""
        return [text[1000 * turn + i :][: int(size)] for i, size in enumerate(sizes)]

    def by_batches(prompts: list[list[int]]) -> None:
        for begin in range(0, len(prompts), options.rows):
            batch = slice(begin, begin + options.rows)
            qwen.generate(prompts[batch], greedy, max_tokens=max(limits[batch]))

    def by_engine(prompts: list[list[int]]) -> None:
        for prompt, limit in zip(prompts, limits, strict=True):
            engine.add(prompt, greedy, max_tokens=limit)
        while not engine.is_idle:
            engine.step()

    seconds: dict[str, float] = {}
    for turn in range(2):
        for name, run in {"generate, batches": by_batches, "engine": by_engine}.items():
            began = time.perf_counter()
            run(prompts(turn))
            seconds[name] = time.perf_counter() - began
    for name, taken in seconds.items():
        print(f"{name:<20}{sum(limits) / taken:>10.1f} tok/s of answers asked for")
    print(f"{'ratio':<20}{seconds['generate, batches'] / seconds['engine']:>10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
