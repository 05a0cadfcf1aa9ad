"""Documents tokenised once and for all: files of uint32 that training reads where it needs them, without unpacking or
parsing.

A folder holds `index.json` and, for each shard, `NAME.tokens` (uint32, little-endian, every document closed by
`<|endoftext|>`) and `NAME.ends.npy` (int64: where each document ends, in tokens).
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.weights._files import new_folder

INDEX = "index.json"
_KIND = "qwen-jax token shards"
_PROBE = "def naïve(x):\n\treturn x ** 2  # 3.14\n\nIt's 2024; 今天天气很好。 Größe, мир, مرحبا, 😀 <|endoftext|>"


class Shards:
    """The documents of a folder of shards, by number; each is read when it is looked at. Raises InputError when the
    folder is not whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            text = (folder / INDEX).read_bytes()
            index = json.loads(text)
            if index.get("kind") != _KIND or index.get("version") != 1:
                raise ValueError("it has another kind or version")
            self._shards, self._tokenizer = index["shards"], index["tokenizer"]
            self._ends = list(itertools.accumulate(shard["documents"] for shard in self._shards))
            self.num_tokens: int = sum(shard["tokens"] for shard in self._shards)
            for shard in self._shards:
                if (size := self._path(shard, "tokens").stat().st_size) != 4 * shard["tokens"]:
                    raise ValueError(f"{shard['name']}.tokens has {size:,} bytes and not {4 * shard['tokens']:,}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder} is not a whole folder of token shards ({error}); make it anew.") from None
        self.digest = hashlib.sha256(text).hexdigest()[:16]
        """Of the index, which holds a checksum of every shard."""

    def check(self, tokenizer: Tokenizer, fim_rate: float) -> None:
        """Raises InputError when the shards are of another tokenizer, or what is asked for needs the texts."""
        if self._tokenizer != identity(tokenizer):
            raise InputError(f"the shards in {self._folder} are of another tokenizer; make them anew with this one.")
        if fim_rate:
            raise InputError(
                f"fill-in-the-middle cuts texts, and {self._folder} holds tokens; use the texts themselves."
            )

    def _path(self, shard: dict[str, Any], ending: str) -> Path:
        return self._folder / f"{shard['name']}.{ending}"

    @functools.cached_property
    def _open(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            (
                np.memmap(self._path(shard, "tokens"), "<u4", "r"),
                np.load(self._path(shard, "ends.npy"), mmap_mode="r"),
            )
            for shard in self._shards
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        number = bisect.bisect_right(self._ends, index)
        tokens, ends = self._open[number]
        at = index - (self._ends[number] - len(ends))
        return tokens[int(ends[at - 1]) if at else 0 : int(ends[at])]


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tells two tokenizers apart: their size, and what they make of a text with a bit of everything."""
    ids = tokenizer.encode(_PROBE, allow_special=False)
    return {"vocab_size": len(tokenizer), "probe": hashlib.sha256(repr(ids).encode()).hexdigest()[:16]}


def write_shards(
    documents: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    out: Path,
    shard_tokens: int,
    advance: Callable[[int, int], None],
) -> dict[str, int]:
    """Writes documents of tokens to the new folder `out`, in order, into shards of about `shard_tokens` tokens.

    `advance` is told the documents and tokens of each shard. Returns how many shards, documents and tokens there are.
    Raises InputError when `out` exists or cannot be written; nothing is left then.
    """
    shards: list[dict[str, Any]] = []
    with new_folder(out) as folder:
        iterator = iter(documents)
        for first in iterator:
            name = f"shard-{len(shards):05}"
            ends, digest = [0], hashlib.sha256()
            with (folder / f"{name}.tokens").open("wb") as file:
                for tokens in itertools.chain([first], iterator):
                    data = np.asarray(tokens, "<u4").tobytes()
                    file.write(data)
                    digest.update(data)
                    ends.append(ends[-1] + len(tokens))
                    if ends[-1] >= shard_tokens:
                        break
            np.save(folder / f"{name}.ends.npy", np.asarray(ends[1:], np.int64))
            shards.append({"name": name, "documents": len(ends) - 1, "tokens": ends[-1], "sha256": digest.hexdigest()})
            advance(len(ends) - 1, ends[-1])
        index = {"kind": _KIND, "version": 1, "tokenizer": identity(tokenizer), "shards": shards}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return {
        "shards": len(shards),
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
    }
