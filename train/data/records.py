"""What a source gives: documents by number, and the document in a record of JSON, Parquet or a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen_jax.errors import InputError
from train.data.config import SourceConfig


class Repository(NamedTuple):
    """A repository-level document: (path, text) of each file, in order."""

    name: str
    files: tuple[tuple[str, str], ...]


class Conversation(NamedTuple):
    """Messages in OpenAI's form, and the tools that the assistant has."""

    messages: tuple[Any, ...]
    tools: tuple[Any, ...] | None


class BadRecord(str):
    """In place of a document that cannot be used: an empty text."""


# Text, or the tokens of a document in shards, uint32 [N], closed by `<|endoftext|>`
Document = str | Repository | Conversation | np.ndarray


class Source(Protocol):
    """Documents by number, as grain's random access sources."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Document: ...


def document_of(record: Any, config: SourceConfig, place: str) -> Document:
    """The document in a record. Raises InputError naming `place` when it is not there."""
    if not isinstance(record, Mapping):
        raise InputError(f"{place} is {type(record).__name__} and not an object with a field {config.text_field!r}.")
    if config.repo_level:
        try:
            files = tuple((text_of(file["path"], place), text_of(file["content"], place)) for file in record["files"])
            return Repository(text_of(record["repo_name"], place), files)
        except (KeyError, TypeError):
            raise InputError(
                f"{place} is no repository: it needs repo_name, and files as a list of path and content."
            ) from None
    if config.messages_field:
        messages, tools = record.get(config.messages_field), record.get("tools")
        if not isinstance(messages, list) or not isinstance(tools, list | None):
            raise InputError(f"{place} is no conversation: it needs a list of messages in {config.messages_field!r}.")
        return Conversation(tuple(messages), None if tools is None else tuple(tools))
    if config.text_field not in record:
        fields = ", ".join(map(str, record)) or "none"
        raise InputError(f"{place} has no field {config.text_field!r} (it has: {fields}); name one with text_field.")
    return text_of(record[config.text_field], place)


def text_of(text: Any, place: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{place}: the text is {type(text).__name__} and not a string; name another text_field.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{place} has half a surrogate pair, which UTF-8 cannot hold; repair the text.") from None
    return text
