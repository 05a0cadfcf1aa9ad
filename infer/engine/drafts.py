"""Drafts of what comes next, looked up in what a request has said before (prompt lookup, github.com/apoorvumang)."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that a draft has at most, and the size of the n-gram after which they came before.
DRAFTED, NGRAM = 8, 3
# A draft costs about three steps on a CPU: where fewer tokens of it come true, the next is tried later.
WORTH, PAUSE = 3.0, 32


class Drafts:
    """Where each n-gram of one request's tokens was seen last, and how well drafts have done."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0
        self._mean = float(DRAFTED)
        self._not_before = 0

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
            self._not_before, self._mean = self._known + PAUSE, float(WORTH)
