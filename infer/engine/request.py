"""One prompt and its answer, as an engine keeps them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from infer.engine.drafts import Drafts
from infer.stops import AnswerText
from infer.stream import Answer, Asked
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from infer.grammar import Matcher


class PromptToken(NamedTuple):
    """A token of a prompt: its log-probability after those before, and the likeliest there."""

    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and its answer. The lists of ids, and `held`, are all that there is to know to go on anywhere."""

    asked: Asked
    num_top: int
    text: AnswerText
    answer: Answer
    pages: list[int] = dataclasses.field(default_factory=list)
    held: int = 0
    """Tokens whose keys and values lie in the pages."""
    keys: list[bytes] = dataclasses.field(default_factory=list)
    """Of the whole pages so far."""
    cached: int = 0
    """Tokens of the prompt that were found in pages of earlier requests."""
    cancelled: bool = False
    matcher: Matcher | None = None
    """What the answer may go on with, where it has to have a form."""
    wants_prompt_logprobs: bool = False
    prompt_logprobs: list[PromptToken] = dataclasses.field(default_factory=list)
    """Of each token of the prompt but the first, once it is read, where they are wanted."""
    hidden: np.ndarray | None = None
    """[D], the final hidden state of the prompt's last token, where no answer is wanted."""
    drafts: Drafts = dataclasses.field(default_factory=Drafts)
    error: InputError | None = None
    """What ended it besides its own end."""

    @property
    def tokens(self) -> list[int]:
        return self.asked.prompt + self.answer.tokens

    @property
    def to_read(self) -> int:
        """Tokens that have to be in the cache before the next one is chosen, but for the last of an answer."""
        return len(self.asked.prompt) + max(0, len(self.answer.tokens) - 1)

    @property
    def is_over(self) -> bool:
        return self.cancelled or self.error is not None or self.answer.finish_reason is not None
