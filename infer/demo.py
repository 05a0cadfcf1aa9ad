"""`qwen-jax demo`: one coding question, answered by the default model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import tyro

from infer.arguments import ModelArguments, closing_line

QUESTION = "Write a Python function is_prime(n) that returns whether n is a prime number. Keep the answer short."


@dataclasses.dataclass(frozen=True)
class Arguments(ModelArguments):
    """Answers one coding question, streaming, and says how fast it was."""


def main(argv: Sequence[str]) -> int:
    qwen = tyro.cli(Arguments, args=argv, prog="qwen-jax demo").load()
    from rich.console import Console

    Console().print(f"\n> {QUESTION}\n", style="bold", markup=False, highlight=False)
    sampling = qwen.sampling(temperature=0.0)
    prompt = qwen.chat_prompt(QUESTION)
    # a first run, cut short, so that the rates below are not the compiler's
    for _ in itertools.islice(qwen.stream([prompt], sampling), 2):
        pass
    stream = qwen.stream([prompt], sampling)
    for _, text in stream:
        print(text, end="", flush=True)
    print(f"\n\n{closing_line(stream.timing)}")
    return 0
