"""A needle in a haystack: one sentence with a number, hidden at some depth of a long text, and asked for at its end."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from infer.qwen import Qwen
from infer.sampling import Sampling
from qwen_jax import chat
from qwen_jax.errors import InputError

NEEDLE = " The special magic number of {name} is {number}. "
QUESTION = "What is the special magic number of {name}? Answer with the number only."
COMPLETION = "The special magic number of {name} is"
NAMES = ("Amsterdam", "Beijing", "Cairo", "Delhi", "Edinburgh", "Florence", "Geneva", "Hangzhou", "Istanbul", "Jakarta")
# The haystack without a text of one's own, of passkey retrieval (arXiv 2305.16300).
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
ANSWER_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Trial:
    """One prompt and the number that it hides."""

    length: int
    depth: float
    number: str
    prompt: list[int]


class Haystack:
    """Sentences of a text, as token ids, from which prompts of any length are cut."""

    def __init__(self, qwen: Qwen, text: str = "") -> None:
        """Raises InputError when the text has no sentence."""
        sentences = [piece for piece in re.split(r"(?<=[.!?。！？\n])", text or FILLER) if piece.strip()]
        if not sentences:
            raise InputError("the haystack has no sentence; give a text file that is not empty.")
        self._qwen = qwen
        self._sentences = qwen.tokenizer.encode_batch(sentences, allow_special=False)

    def trial(self, length: int, depth: float, seed: int) -> Trial:
        """A prompt of at most `length` tokens, less at most one sentence, the needle at `depth` from 0 to 1.

        Raises InputError when needle and question alone are longer.
        """
        rng = random.Random(f"{length} {depth} {seed}")
        name, number = rng.choice(NAMES), str(rng.randrange(10000, 100000))
        encode = self._qwen.tokenizer.encode
        needle = encode(NEEDLE.format(name=name, number=number))
        before, after = self._frame(name)
        room = length - len(before) - len(after) - len(needle)
        if room < 0:
            raise InputError(f"a length of {length} has no room for the needle; use at least {length - room}.")
        hay: list[list[int]] = []
        at, taken = rng.randrange(len(self._sentences)), 0
        while taken + len(sentence := self._sentences[at % len(self._sentences)]) <= room:
            hay.append(sentence)
            at, taken = at + 1, taken + len(sentence)
        starts = np.cumsum([0, *map(len, hay)])  # of each sentence, and the end
        hay.insert(int(np.argmin(np.abs(starts - depth * taken))), needle)
        return Trial(length, depth, number, [*before, *itertools.chain.from_iterable(hay), *after])

    def _frame(self, name: str) -> tuple[list[int], list[int]]:
        """What stands before and after the haystack: the chat template with the question, or a sentence to complete."""
        qwen, encode = self._qwen, self._qwen.tokenizer.encode
        if not qwen.is_chat_model:
            return [], encode("\n" + COMPLETION.format(name=name))
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        message = {"role": "user", "content": f"{mark}\n\n{QUESTION.format(name=name)}"}
        own: dict[str, Any] = {"template": qwen.chat_template, "special_tokens": qwen.tokenizer.named_tokens}
        before, after = chat.render([message], **own).split(mark)
        return encode(before), encode(after)


def scores(qwen: Qwen, trials: Sequence[Trial]) -> list[bool]:
    """Whether the greedy answer to each prompt names its number; the prompts are answered together."""
    answers = qwen.generate([trial.prompt for trial in trials], Sampling(), max_tokens=ANSWER_TOKENS)
    return [trial.number in answer.text for trial, answer in zip(trials, answers, strict=True)]
