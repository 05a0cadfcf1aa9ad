"""A tokenizer of one token per byte, and collections of documents that tell where each token came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qwen_jax.tokenizer import Tokenizer

SPECIAL = ["endoftext", "fim_prefix", "fim_middle", "fim_suffix", "repo_name", "file_sep"]


def byte_tokenizer(special: Sequence[str] = SPECIAL) -> Tokenizer:
    """One token per byte of the text in NFC, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens([f"<|{name}|>" for name in special])
    return Tokenizer(backend)


def write_jsonl(path: Path, texts: Iterable[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def numbered_texts(count: int, seed: int = 0, mean: float = 60.0, name: str = "d") -> list[str]:
    """Texts of very different lengths, each beginning with its own name and number."""
    lengths = np.random.default_rng(seed).exponential(mean, count).astype(int)
    return [f"{name}{i}:" + "x" * length for i, length in enumerate(lengths)]


def segments(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The tokens of every segment of a batch, row by row."""
    found = []
    for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
        found += [tokens[ids == segment] for segment in range(1, ids.max(initial=0) + 1)]
    return found


def assert_same(first: Sequence[dict[str, np.ndarray]], second: Sequence[dict[str, np.ndarray]]) -> None:
    """Equal batches, bit for bit and type for type."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])
