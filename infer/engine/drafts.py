"""Drafts of what comes next, looked up in what a request has said before (prompt lookup, github.com/apoorvumang)."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that a draft has at most, and the size of the n-gram after which they came before.
DRAFTED, NGRAM = 8, 3
# A draft costs about two and a half steps on a CPU: where fewer tokens come true, the next is tried later.
WORTH, PAUSE = 3.0, 32
# Requests at most that are drafted for at a time: the product of more rows and drafts is no longer bound by memory.
DRAFTING = 4


class Drafts:
    """Where each n-gram of one request's tokens was seen last, and how well drafts have done."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0
        self._mean = float(DRAFTED)
        self._not_before, self._pause = 0, PAUSE

    def after(self, tokens: Sequence[int]) -> list[int]:
        """What followed these tokens' last n-gram when it came before, if that is worth trying; else nothing."""
        # the last n-gram is not known yet: it would find itself
        for end in range(max(self._known, NGRAM), len(tokens)):
            self._after[tuple(tokens[end - NGRAM : end])] = end
        self._known = max(self._known, len(tokens))
        if len(tokens) < self._not_before or (begin := self._after.get(tuple(tokens[-NGRAM:]))) is None:
            return []
        self._not_before = 0
        period = len(tokens) - begin  # what repeats itself goes on doing so
        return [tokens[begin + i % period] for i in range(DRAFTED)]

    def learn(self, right: int) -> None:
        """How many tokens of the last draft came true."""
        self._mean += 0.5 * (right - self._mean)
        if self._mean < WORTH:
            self._not_before, self._mean = self._known + self._pause, WORTH
            self._pause *= 2
