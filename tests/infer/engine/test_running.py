"""An engine in its own thread answers threads and event loops alike, and takes other weights in between."""

import asyncio

import jax
import pytest

from infer.engine import Engine, Full, RunningEngine
from infer.qwen import Qwen
from qwen_jax.errors import InputError
from qwen_jax.model import init
from tests.infer import tiny


def test_threads_loops_and_other_weights() -> None:
    first, second = (Qwen(tiny.CONFIG, init(tiny.CONFIG, jax.random.key(i)), tiny.tokenizer()) for i in (0, 1))
    greedy = first.sampling(temperature=0.0)
    texts = ["the rain in there", "when", "the other thing"]
    wanted = {qwen: [answer.text for answer in qwen.generate(texts, greedy, max_tokens=12)] for qwen in (first, second)}
    running = RunningEngine(Engine(first, rows=2, page=16, piece=32, steps=4), max_waiting=2)
    handles = [running.submit(text, greedy, max_tokens=12) for text in texts]
    assert ["".join(piece.text for piece in handle) for handle in handles] == wanted[first]

    async def ask() -> list[str]:
        async def one(text: str) -> str:
            return "".join([piece.text async for piece in running.submit(text, greedy, max_tokens=12)])

        return await asyncio.gather(*map(one, texts))

    assert asyncio.run(ask()) == wanted[first]
    # its prefixes were read with the weights before
    running.replace_params(second.params)
    assert asyncio.run(ask()) == wanted[second]

    cancelled = running.submit("the", greedy, max_tokens=400)
    waiting = [running.submit("the", greedy, max_tokens=400) for _ in range(3)]
    with pytest.raises(Full, match="or wait"):
        running.submit("the", greedy)
    cancelled.cancel()
    assert [piece for piece in cancelled][-1].is_over
    with pytest.raises(InputError, match="context"):
        running.submit("the " * 600, greedy)
    running.stop()
    for handle in waiting:
        with pytest.raises(InputError, match="stopped"):
            list(handle)
    with pytest.raises(InputError, match="stopped"):
        running.submit("the", greedy)
