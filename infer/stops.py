"""Where an answer ends, as its tokens come: at a stop id, at a stop text, or at its limit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from qwen_jax.tokenizer import Tokenizer


class AnswerText:
    """Tokens of one answer in, the text that may be shown out, until `finish_reason` is set.

    Stop texts are looked for in the text with its special tokens, which are not shown.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: Collection[int], limit: int) -> None:
        self.finish_reason: Literal["stop", "length"] | None = None
        self._tokenizer, self._stop, self._stop_ids, self._limit = tokenizer, stop, stop_ids, limit
        self._decoder = tokenizer.stream()
        self._count = 0
        # what may yet turn out to be the beginning of a stop text, and which characters of it are shown
        self._held: list[tuple[str, bool]] = []

    def add(self, id: int) -> str:
        """The text that token `id` settles; with it the answer may end."""
        self._count += 1
        if id in self._tokenizer.special_ids:
            self._hold(self._tokenizer.token_bytes(id).decode(), shown=False)
        elif id not in self._stop_ids:
            self._hold(self._decoder.add(id))
        if id in self._stop_ids:
            self.finish_reason = "stop"
        if self.finish_reason is None and self._count >= self._limit:
            self.finish_reason = "length"
        if self.finish_reason:
            self._hold(self._decoder.flush())
        text = "".join(char for char, _ in self._held)
        found = [at for mark in self._stop if (at := text.find(mark)) >= 0]
        settled = len(text)
        if found:
            self.finish_reason, settled = "stop", min(found)
        elif self.finish_reason is None:
            beginnings = (n for mark in self._stop for n in range(1, len(mark)) if text.endswith(mark[:n]))
            settled -= max(beginnings, default=0)
        shown = "".join(char for char, shown in self._held[:settled] if shown)
        del self._held[:settled]
        return shown

    def _hold(self, text: str, *, shown: bool = True) -> None:
        self._held += [(char, shown) for char in text]
