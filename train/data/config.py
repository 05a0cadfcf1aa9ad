"""What is read, how it is mixed, and what a batch looks like."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from qwen_jax.errors import InputError

Format = Literal["auto", "jsonl", "parquet", "arrayrecord", "text", "hf", "shards"]
Packing = Literal["best-fit", "concat"]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One collection of documents."""

    path: str
    """A file, a folder, a pattern such as `data/**/*.jsonl`, a Hugging Face data set's id or folder, or one of our
    corpora: `corpus:python`, `corpus:english`, `corpus:chinese`."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources' weights."""
    format: Format = "auto"
    """`auto` goes by the file names; `jsonl` reads arrays too; `hf` needs the package `datasets`."""
    text_field: str = "text"
    """The field of a record that holds the text."""
    messages_field: str | None = None
    """Records are conversations: the field that holds the list of messages, beside `tools` where there are any. They
    are written by the tokenizer's chat template, and only what the assistant says is learned."""
    split: str = "train"
    """Of a Hugging Face data set; our corpora have `train` and `held-out`."""
    on_bad_record: Literal["refuse", "skip"] = "refuse"
    """A record without its text, or that is not UTF-8: said before training where records are indexed, else when it is
    met, with file and place; or left out and counted."""
    repo_level: bool = False
    """Documents are whole repositories: records with `repo_name` and `files`, or one sub-folder each."""

    def __post_init__(self) -> None:
        if self.messages_field and self.repo_level:
            raise InputError(f"{self.path} cannot hold conversations and repositories; leave one of the two out.")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(
                f"the weight of {self.path} is {self.weight}, which must be above 0; leave the source out."
            )


@dataclasses.dataclass(frozen=True)
class LengthShare:
    """A share of the rows that is packed only from documents of some lengths."""

    share: float
    """Share of the rows, relative to the other shares."""
    min_tokens: int = 0
    """Shortest document, in tokens with its `<|endoftext|>`."""
    max_tokens: int | None = None
    """Documents are shorter than this; None sets no limit."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.share) and self.share > 0):
            raise InputError(f"a length share is {self.share}, which must be above 0; leave it out.")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.max_tokens <= self.min_tokens):
            raise InputError(
                f"a length share goes from {self.min_tokens} to {self.max_tokens} tokens; "
                "its min_tokens must be 0 or more and below its max_tokens."
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources and the batches made of them. Equal configs give equal batches, whatever `num_workers` is."""

    sources: tuple[SourceConfig, ...]
    sequence_length: int = 4096
    """Tokens in a row."""
    batch_size: int = 8
    """Rows in a batch, over all processes."""
    packing: Packing = "best-fit"
    """`best-fit` fills rows with whole documents and cuts only those longer than a row; `concat` joins all documents
    and splits them wherever a row ends."""
    length_shares: tuple[LengthShare, ...] = ()
    """For long-context stages, e.g. 40 % of the rows full of long documents; empty takes documents as they come."""
    fim_rate: float = 0.0
    """Share of the documents rewritten as prefix, suffix, middle."""
    shuffle: bool = True
    """Each epoch in an order of its own; False keeps the sources' order."""
    seed: int = 0
    """Of the order, the rows' order and the cuts of fill-in-the-middle."""
    epochs: int | None = None
    """Passes over the sources; None never ends."""
    num_workers: int = 0
    """Processes that read and tokenise; 0 does it in a thread of this one."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("the data has no source; name at least one file or folder.")
        for name, least in (("sequence_length", 2), ("batch_size", 1), ("num_workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, which must be {least} or more.")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"epochs is {self.epochs}, which must be 1 or more; None never ends.")
        if not 0 <= self.fim_rate <= 1:
            raise InputError(f"fim_rate is {self.fim_rate}, which must be between 0 and 1.")
        by_length = sorted(self.length_shares, key=lambda share: share.min_tokens)
        for short, long in zip(by_length, by_length[1:], strict=False):
            if short.max_tokens is None or short.max_tokens > long.min_tokens:
                raise InputError(
                    f"the length shares from {short.min_tokens} and from {long.min_tokens} tokens overlap; "
                    f"give the first max_tokens={long.min_tokens} or less."
                )
