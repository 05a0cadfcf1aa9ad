"""A running generation: prompts in, pieces of answers out as the device produces them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
import numpy as np

from infer.decode import DecodeState, Produced, bucket, decode, half_bucket, pad_prompts, prefill, widen
from infer.sampling import Sampling, SamplingRows, allowed_next
from infer.stops import AnswerText
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from infer.qwen import Qwen

# The likeliest tokens that can be reported at each position.
TOP = 20
NO_ID = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt's ids, and what its answer may be."""

    prompt: list[int]
    sampling: Sampling
    limit: int
    """Tokens of the answer."""
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]


@dataclasses.dataclass
class Answer:
    """One prompt's answer, growing while it is generated. `tokens` may end with a stop id, `text` does not."""

    prompt_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    """Of each token under the model's own distribution, before penalties, temperature and truncation."""
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def add(self, id: int, logprob: float, top: list[tuple[int, float]], text: AnswerText) -> str:
        """Takes the next token in, and returns the text that `text` settles with it; `top`: what is reported of it.

        Raises InputError where the log-probability is no number.
        """
        if not math.isfinite(logprob):
            raise InputError(
                f"the model's logits are not finite at token {len(self.tokens) + 1} of an answer; its activations do "
                "not fit float16 (use bfloat16 or float32), or its weights are damaged."
            )
        self.tokens.append(id)
        self.logprobs.append(logprob)
        if top:
            self.top_logprobs.append(top)
        piece = text.add(id)
        self.text += piece
        self.finish_reason = text.finish_reason
        return piece


@dataclasses.dataclass
class Timing:
    """Seconds of wall time. Prefill ends with the first token, so its seconds are the time to first token."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    answer_tokens: int = 0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Stream(Iterator[tuple[int, str]]):
    """A running generation, to be iterated once: (row, new text). `answers` and `timing` fill meanwhile."""

    def __init__(self, qwen: Qwen, asked: list[Asked], num_top: int, steps: int) -> None:
        self._qwen = qwen
        self._prompts, self._samplings, self._limits = zip(
            *((x.prompt, x.sampling, x.limit) for x in asked), strict=True
        )
        self.answers = [Answer(len(prompt)) for prompt in self._prompts]
        self.timing = Timing(prompt_tokens=sum(map(len, self._prompts)))
        self._num_top = num_top
        self._by_step = any(sampling.needs_history for sampling in self._samplings)
        self._steps = 1 if self._by_step else steps
        self._texts = [AnswerText(qwen.tokenizer, x.stop, frozenset(x.stop_ids), x.limit) for x in asked]
        # padded with what is no id, so that their number compiles no other program
        stop_ids = asked[0].stop_ids
        padding = bucket(len(stop_ids), 16) - len(stop_ids)
        self._stop_ids = np.array([*stop_ids, *[NO_ID] * padding], np.int32)
        self._static = {"config": qwen.config, "vocab_size": len(qwen.tokenizer), "num_top": TOP}
        self._pieces = self._run()

    def __next__(self) -> tuple[int, str]:
        return next(self._pieces)

    def _run(self) -> Iterator[tuple[int, str]]:
        began = time.perf_counter()
        state, produced = self._prefill()
        tokens = np.asarray(produced.tokens)
        self.timing.prefill_seconds = time.perf_counter() - began
        yield from self._take(produced, tokens.shape[1])
        rows = max(state.tokens.shape[0], self._qwen.backend.min_decode_rows)
        if rows != state.tokens.shape[0]:
            with self._qwen.entered():
                state = widen(state, rows)
        while not all(answer.finish_reason for answer in self.answers):
            before = self.timing.answer_tokens
            began = time.perf_counter()
            finished = np.array([bool(a.finish_reason) for a in self.answers] + [True] * (rows - len(self.answers)))
            with self._qwen.entered():
                state = state.replace(done=jnp.asarray(finished))
                if self._by_step and state.rows is not None:
                    state = state.replace(rows=state.rows.replace(allowed=jnp.asarray(self._allowed(rows))))
                state, produced, steps = decode(
                    self._qwen.params, state, np.int32(self._steps), self._stop_ids, **self._static
                )
            count = int(steps)
            self.timing.decode_seconds += time.perf_counter() - began
            yield from self._take(produced, count)
            self.timing.decoded_tokens += self.timing.answer_tokens - before

    def _prefill(self) -> tuple[DecodeState, Produced]:
        config, rows = self._qwen.config, bucket(len(self._prompts))
        longest = max(map(len, self._prompts))
        length = min(half_bucket(longest, 32), config.context_length)
        needed = max(len(p) + limit for p, limit in zip(self._prompts, self._limits, strict=True))
        tokens, lengths = pad_prompts(list(self._prompts), rows, length)
        filler = rows - len(self._prompts)
        with self._qwen.entered():
            return prefill(
                self._qwen.params,
                tokens,
                lengths,
                np.array([*self._limits, *[0] * filler], np.int32),
                SamplingRows.create(
                    [*self._samplings, *[Sampling()] * filler],
                    [*self._prompts, *[[0]] * filler],
                    config.vocab_size,
                    report=self._num_top > 0,
                ),
                self._stop_ids,
                capacity=max(half_bucket(needed, 256), length),
                **self._static,
            )

    def _allowed(self, rows: int) -> np.ndarray:
        """Of every row, what may come next in its answer; of fillers anything."""
        told = zip(self._samplings, self._prompts, self.answers, strict=True)
        size = self._qwen.config.vocab_size
        allowed = [allowed_next(sampling, prompt + answer.tokens, size) for sampling, prompt, answer in told]
        return np.stack(allowed + [allowed_next(Sampling(), [], size)] * (rows - len(allowed)))

    def _take(self, produced: Produced, count: int) -> Iterator[tuple[int, str]]:
        """Adds `count` columns of new tokens to the unfinished answers and yields what can be shown of them."""
        tokens, logprobs = (np.asarray(x[:, :count]).tolist() for x in (produced.tokens, produced.logprobs))
        tops = (produced.top_tokens, produced.top_logprobs)
        top_tokens, top_logprobs = (np.asarray(x[:, :count, : self._num_top]).tolist() for x in tops)
        for row, (answer, text) in enumerate(zip(self.answers, self._texts, strict=True)):
            for i in range(count):
                if answer.finish_reason:
                    break
                top = list(zip(top_tokens[row][i], top_logprobs[row][i], strict=True))
                piece = answer.add(tokens[row][i], logprobs[row][i], top, text)
                self.timing.answer_tokens += 1
                if piece:
                    yield row, piece
