"""`python -m bench.serve URL...`: servers under load, beside each other: time to first token, and tokens per second.

Each URL is an OpenAI-compatible server that runs already, such as http://127.0.0.1:8000, with one model. All get the
same prompts of other words each time, streamed, greedy and of full length; servers take turns. Read the ratios.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sys
import time
from collections.abc import Sequence

import tyro

WORDS = "alpha river stone table window orange garden letter number simple travel winter summer forest paper".split()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Requests to servers that run already, as a table."""

    urls: tyro.conf.Positional[tuple[str, ...]]
    concurrency: tuple[int, ...] = (1, 8, 16)
    requests: int = 2
    """For each that runs at the same time."""
    prompt_words: int = 120
    tokens: int = 64
    """Of each answer."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Arguments, args=list(argv), prog="python -m bench.serve")
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("server", "at a time", "tok/s", "ratio", "first token p50 s", "p95 s"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    for count in options.concurrency:
        first_rate = None
        for turn, url in enumerate(options.urls):
            rate, firsts = asyncio.run(_load(url, count, options, seed=1000 * count + turn))
            first_rate = first_rate or rate
            half, most = firsts[len(firsts) // 2], firsts[int(0.95 * len(firsts))]
            table.add_row(url, str(count), f"{rate:.1f}", f"{first_rate / rate:.2f}", f"{half:.2f}", f"{most:.2f}")
    Console().print(table)
    for url in options.urls:
        cold, warm = asyncio.run(_prefix(url, seed=time.time_ns()))
        print(f"{url}: first token of a prompt of 1,400 words {cold:.2f} s, of one that shares 95 % of it {warm:.2f} s")
    return 0


async def _load(url: str, count: int, options: Arguments, seed: int) -> tuple[float, list[float]]:
    """Tokens per second, and the sorted times to first tokens."""
    rng = random.Random(seed)
    prompts = [" ".join(rng.choices(WORDS, k=options.prompt_words)) for _ in range(count * options.requests)]
    firsts: list[float] = []
    gate = asyncio.Semaphore(count)

    async def one(prompt: str) -> int:
        async with gate:
            first, tokens = await _ask(url, prompt, options.tokens)
        firsts.append(first)
        return tokens

    began = time.perf_counter()
    total = sum(await asyncio.gather(*map(one, prompts)))
    return total / (time.perf_counter() - began), sorted(firsts)


async def _prefix(url: str, seed: int) -> tuple[float, float]:
    """Times to first token of a long prompt, and of another that begins as it does."""
    rng = random.Random(seed)
    shared = " ".join(rng.choices(WORDS, k=1330))
    ends = [" ".join(rng.choices(WORDS, k=70)) for _ in range(2)]
    cold, warm = [(await _ask(url, f"{shared} {end}", 1))[0] for end in ends]
    return cold, warm


async def _ask(url: str, prompt: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and how many came."""
    import openai

    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        began = time.perf_counter()
        first, used = None, 0
        stream = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if first is None and chunk.choices:
                first = time.perf_counter() - began
            if chunk.usage:
                used = chunk.usage.completion_tokens
    assert first is not None
    return first, used


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
