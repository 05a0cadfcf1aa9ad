"""Documents to tokens: plain text, repositories, and fill-in-the-middle as Qwen2.5-Coder has them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from qwen_jax.chat import encode_conversation, turns
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from train.data.records import BadRecord, Conversation, Document, Repository
from train.data.shards import Shards

FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
REPO_TOKENS = ("<|repo_name|>", "<|file_sep|>")


def cut_in_three(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """(prefix, middle, suffix) at two places drawn uniformly ("Efficient Training of Language Models to Fill in the
    Middle", section 3)."""
    first, second = np.sort(rng.integers(0, len(text) + 1, size=2))
    return text[:first], text[first:second], text[second:]


class Tokenise(grain.transforms.RandomMap):
    """A document to {"tokens": int32 [N]}, closed by `<|endoftext|>`; a bad record to no tokens, and "bad"; tokens of
    shards to themselves; a conversation by its template, with "learned" bool [N], which marks what the assistant says.

    A special token that is spelled out in a text is ordinary text. With probability `fim_rate` a document, or the last
    file of a repository, becomes prefix, suffix, middle (PSM), unless it would then not fit a row of `max_tokens`.
    """

    def __init__(self, tokenizer: Tokenizer, *, fim_rate: float, max_tokens: int) -> None:
        self._tokenizer, self._fim_rate, self._max_tokens = tokenizer, fim_rate, max_tokens
        self._turn_ends: tuple[int, ...] | None = None

    def random_map(self, element: Document, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if isinstance(element, np.ndarray):
            return {"tokens": element}
        if isinstance(element, Conversation):
            return self._conversation(element)
        if isinstance(element, BadRecord):
            return {"tokens": np.zeros(0, np.int32), "bad": np.ones((), bool)}
        head, text = ([], element) if isinstance(element, str) else self._repository(element)
        end = [self._tokenizer.end_of_text_id]
        ids = None
        if self._fim_rate and rng.random() < self._fim_rate:
            ids = self._fill_in_the_middle(text, rng)
        if ids is None or len(head) + len(ids) + 1 > self._max_tokens:
            ids = self._encode(text)
        return {"tokens": np.array(head + ids + end, np.int32)}

    def _conversation(self, conversation: Conversation) -> dict[str, np.ndarray]:
        template = self._tokenizer.chat_template
        if template is None:
            raise InputError("conversations need a chat template, which this tokenizer lacks; use a chat model's.")
        if self._turn_ends is None:
            self._turn_ends = turns(self._tokenizer, "qwen2.5", template).stop_ids
        ids, learned = encode_conversation(
            self._tokenizer, self._turn_ends, conversation.messages, template=template, tools=conversation.tools
        )
        return {"tokens": np.array(ids, np.int32), "learned": np.array(learned, bool)}

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, allow_special=False)

    def _special(self, names: Sequence[str]) -> list[int]:
        return [self._tokenizer.special_tokens[name] for name in names]

    def _repository(self, repository: Repository) -> tuple[list[int], str]:
        """Everything before the last file's text, and that text."""
        name, separator = self._special(REPO_TOKENS)
        ids = [name, *self._encode(f"{repository.name}\n")]
        text = ""
        for number, (path, content) in enumerate(repository.files):
            last = number == len(repository.files) - 1
            ids += [separator, *self._encode(f"{path}\n" if last else f"{path}\n{content}\n")]
            text = content
        return ids, text

    def _fill_in_the_middle(self, text: str, rng: np.random.Generator) -> list[int]:
        # Composed first, as the tokenizer would: a cut inside a character and its accent would leave other text
        before, middle, after = cut_in_three(unicodedata.normalize("NFC", text), rng)
        start, hole, answer = self._special(FIM_TOKENS)
        return [start, *self._encode(before), hole, *self._encode(after), answer, *self._encode(middle)]


def tokenise_all(source: Any, tokenise: Tokenise, tokenizer: Tokenizer, *, at_once: int = 1024) -> Iterator[np.ndarray]:
    """The tokens of every document in order, tokenised on all cores; bad records are left out."""
    end, rng = tokenizer.end_of_text_id, np.random.default_rng(0)
    for start in range(0, len(source), at_once):
        documents = [source[index] for index in range(start, min(start + at_once, len(source)))]
        documents = [document for document in documents if not isinstance(document, BadRecord)]
        texts = [document for document in documents if isinstance(document, str)]
        ids = iter(tokenizer.encode_batch(texts, allow_special=False))
        for document in documents:
            if isinstance(document, str):
                yield np.array([*next(ids), end], np.uint32)
            else:
                yield tokenise.random_map(document, rng)["tokens"]


def check_special_tokens(tokenizer: Tokenizer, names: Sequence[str], purpose: str) -> None:
    """Raises InputError when the tokenizer lacks one of the tokens `names`."""
    if missing := [name for name in names if name not in tokenizer.special_tokens]:
        raise InputError(f"{purpose} needs {missing[0]}, which this tokenizer lacks; use one of Qwen2.5 or later.")


def mean_tokens(source: Any, tokenise: Tokenise, *, documents: int = 1000, tokenised: int = 50) -> float:
    """Tokens in a document of `source`, estimated from documents spread evenly over it unless it knows.

    The bytes are the mean of `documents` of them, the tokens per byte that of the first 4 KiB of `tokenised` ones.
    """
    if isinstance(source, Shards):
        return source.num_tokens / len(source)
    spread = np.linspace(0, len(source) - 1, min(documents, len(source))).astype(int)
    texts = [plain_text(source[int(index)]) for index in spread]
    some = [text[:4096] for text in texts[:: -(-len(texts) // tokenised)]]
    rng = np.random.default_rng(0)
    tokens = sum(len(tokenise.random_map(text, rng)["tokens"]) for text in some)
    rate = tokens / max(1, sum(len(text.encode()) for text in some))
    return max(1.0, rate * float(np.mean([len(text.encode()) for text in texts])))


def plain_text(document: Document) -> str:
    """A document's text; of a repository, the files with their paths."""
    if isinstance(document, Repository):
        return "\n".join(f"{path}\n{text}" for path, text in document.files)
    if isinstance(document, Conversation):
        return json.dumps(document.messages, ensure_ascii=False)
    assert isinstance(document, str)
    return document
