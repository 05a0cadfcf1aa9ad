"""Text that quantisers are calibrated with, and other text that their loss is measured on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.local_path import local_path
from qwen_jax.tokenizer import Tokenizer
from train.data.corpora import CORPORA, corpus_file

HELD_OUT = 16  # sequences


def sequences(
    tokenizer: Tokenizer, sources: Sequence[str], number: int, length: int, held_out: int = HELD_OUT
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [number, length] to calibrate with and [held_out, length] to measure on, as many of each source.

    sources: names of corpora, whose held-out part is the second, or text files, whose end is. Raises InputError when a
    source cannot be read or gives too few tokens.
    """
    parts = [
        _of_source(tokenizer, source, -(-number // len(sources)), length, -(-held_out // len(sources)))
        for source in sources
    ]
    first, second = (np.concatenate(each) for each in zip(*parts, strict=True))
    return first[:number], second[:held_out]


def _of_source(
    tokenizer: Tokenizer, source: str, number: int, length: int, held_out: int
) -> tuple[np.ndarray, np.ndarray]:
    path = local_path(source)
    if source in CORPORA and not path.exists():
        first = _windows(_documents(tokenizer, corpus_file(source, "train")), number, length, source)
        return first, _windows(_documents(tokenizer, corpus_file(source, "held-out")), held_out, length, source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; --calibration takes text files or the corpora {', '.join(CORPORA)}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable UTF-8 text ({error}); give a plain text file.") from None
    ids = tokenizer.encode(text, allow_special=False)
    windows = _windows([ids], max(len(ids) // length, number + held_out), length, source)
    first, last = windows[: len(windows) - held_out], windows[len(windows) - held_out :]
    return first[np.linspace(0, len(first) - 1, number).round().astype(int)], last


def _documents(tokenizer: Tokenizer, file: Path) -> Iterator[list[int]]:
    """The documents in an order drawn once and for all, each ended as in training."""
    lines = file.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    for line in lines:
        yield [*tokenizer.encode(json.loads(line)["text"], allow_special=False), tokenizer.end_of_text_id]


def _windows(documents: Iterable[list[int]], number: int, length: int, source: str) -> np.ndarray:
    """The first `number` windows of the documents one after the other."""
    ids: list[int] = []
    for document in documents:
        ids += document
        if len(ids) >= number * length:
            break
    if len(ids) < number * length:
        raise InputError(
            f"{source} gives {len(ids):,} tokens, too few for {number} sequences of {length}; give more text, or "
            "smaller --sequences or --length."
        )
    return np.asarray(ids[: number * length], np.int32).reshape(number, length)
