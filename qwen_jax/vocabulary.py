"""Vocabularies -> the Rust tokenizer: byte-level BPE from ranks or merges, and SentencePiece's BPE over characters."""

from __future__ import annotations

import base64
import contextlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qwen_jax.checked import printable, shown
from qwen_jax.errors import InputError

# Qwen1 to Qwen3; digits one at a time, and the leading space belongs to the word.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's byte -> printable character map: printable Latin-1 stands for itself, the rest is moved to U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(moved)}


BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_chars(token: bytes) -> str:
    return token.decode("latin-1").translate(BYTE_TO_CHAR)


def to_bytes(chars: str) -> bytes:
    """The bytes that a token stands for; of other characters it is plain text, as for the ByteLevel decoder."""
    try:
        return bytes(map(_CHAR_TO_BYTE.__getitem__, chars))
    except KeyError:
        return chars.encode()


# --- Byte-level BPE ---------------------------------------------------------------------------------------------------


def merges_from_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge list, in rank order, of a BPE given as ranks (bytes -> rank).

    BPE with only the ranks below a token's own must leave that token in two parts: these are its merge.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        splits = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if ranks.get(token[:i], rank) < rank and ranks.get(token[i:], rank) < rank
        ]
        if len(splits) != 1:  # the two parts are tokens of lower rank, so a single candidate needs no search
            splits = [tuple(_bpe(token, ranks, below=rank))]
        if len(splits[0]) != 2:
            raise InputError(f"the ranks are not a BPE: token {rank} ({token!r}) is no merge of two earlier tokens.")
        merges.append(splits[0])
    return merges


def _bpe(token: bytes, ranks: Mapping[bytes, int], *, below: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        if rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a qwen.tiktoken file.") from None
    try:
        pairs = [line.split() for line in lines if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise InputError(
            f"{path} is not a tiktoken file (a base64 token and its rank per line); download it again."
        ) from None
    if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([b]) in ranks for b in range(256)):
        raise InputError(f"{path} is incomplete: its ranks must be 0, 1, 2, ... with all 256 bytes; download it again.")
    return ranks


@contextlib.contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Raises InputError "{what} ({reason}); {advice}." where the tokenizers library fails."""
    try:
        yield
    except BaseException as error:
        # the Rust side raises plain Exception, and where it panics something that is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({printable(str(error))}); {advice}.") from None


def _pairs(vocab: Mapping[str, int], merges: Iterable[str]) -> list[tuple[str, str]]:
    """Of "left right". Raises ValueError where the Rust side would panic, which prints its stack."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    for left, right in pairs:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(f"the merge of {shown(left)} and {shown(right)} is not in the vocabulary")
    return pairs


def build(vocab: dict[str, int], merges: Sequence[str], added: Iterable[tuple[str, bool]]) -> tokenizers.Tokenizer:
    """The Rust tokenizer. `merges` are "left right"; `added` are (text, special), their ids follow the vocabulary."""
    with refusing("vocabulary and merges do not belong together", "use one checkpoint's files"):
        backend = tokenizers.Tokenizer(models.BPE(vocab, _pairs(vocab, merges)))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False, special=special) for text, special in added])
    return backend


# --- SentencePiece ----------------------------------------------------------------------------------------------------

SPACE = "\u2581"  # what SentencePiece writes for a space
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


class SentencePiece(NamedTuple):
    """A piece of a SentencePiece vocabulary; its id is its place. kind: 1 normal, 2 unknown, 3 control, 4 user-defined,
    5 unused, 6 byte, in `tokenizer.model` and in a GGUF alike."""

    text: str
    score: float
    kind: int


def build_sentencepiece(
    pieces: Sequence[SentencePiece], *, add_prefix: bool = True, charsmap: bytes = b""
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: the best-scored pair is merged first, and what no piece holds falls back to bytes.

    add_prefix: whether a space is put in front of a text. charsmap: the model's own normalisation, compiled.
    """
    vocab = {piece.text: id for id, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    merges = sorted(_scored_merges(pieces, vocab), key=lambda merge: -merge[0])  # ties stay in the order of ids
    with refusing("the SentencePiece vocabulary is damaged", "download it again"):
        pairs = [(left, right) for _, left, right in merges]
        model = models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback="<0x00>" in vocab)
        backend = tokenizers.Tokenizer(model)
        steps: list[normalizers.Normalizer] = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Prepend(SPACE)] if add_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    backend.add_tokens(
        [
            tokenizers.AddedToken(piece.text, normalized=False, special=piece.kind != _USER_DEFINED)
            for piece in pieces
            if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return backend


def _scored_merges(pieces: Sequence[SentencePiece], vocab: Mapping[str, int]) -> Iterator[tuple[float, str, str]]:
    """(score, left, right) of every way to make a piece of two."""
    for piece in pieces:
        if piece.kind != 1:
            continue
        ways = [(piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text))]
        known = [(vocab[a], vocab[b], a, b) for a, b in ways if a in vocab and b in vocab]
        yield from ((piece.score, a, b) for *_, a, b in sorted(known))


def pieces_of(described: Mapping[str, Any]) -> list[SentencePiece]:
    """The inverse of `build_sentencepiece`, from the text of a tokenizer.json: scores are minus the rank of a merge.

    Raises InputError where the merges are not in the order of any scores, or a text is changed before.
    """
    model, refused = described["model"], "this vocabulary cannot be said in SentencePiece's words, as GGUF has them: "
    steps = described["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = steps.get("normalizers", [steps])
    if others := {step["type"] for step in steps} - {"Prepend", "Replace"}:
        raise InputError(f"{refused}it normalises by {shown(min(others))}.")
    if model["type"] != "BPE" or described["pre_tokenizer"] is not None:
        raise InputError(f"{refused}it is no SentencePiece BPE.")
    vocab: dict[str, int] = model["vocab"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    for left, right in pairs:
        if left + right in ranks and next(reversed(ranks)) != left + right:
            raise InputError(f"{refused}two merges that make {shown(left + right)} are not of one rank.")
        ranks.setdefault(left + right, len(ranks))
    added = {token["content"]: token for token in described["added_tokens"]}
    pieces = [SentencePiece(f"[PAD{id}]", -1e4, 5) for id in range(1 + max([*vocab.values(), *_ids(added)]))]
    for text, id in [*vocab.items(), *((text, token["id"]) for text, token in added.items())]:
        if text == model["unk_token"]:
            kind = _UNKNOWN
        elif text in added:
            kind = _CONTROL if added[text]["special"] else _USER_DEFINED
        else:
            kind = 6 if model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", text) else 1
        pieces[id] = SentencePiece(text, -float(ranks.get(text, len(ranks))), kind)
    if not any(piece.kind == _UNKNOWN for piece in pieces):
        raise InputError(f"{refused}it has no unknown token.")
    if {(left, right) for _, left, right in _scored_merges(pieces, vocab)} != set(pairs):
        raise InputError(f"{refused}not every two pieces that make a third are merged.")
    return pieces


def _ids(added: Mapping[str, Any]) -> Iterator[int]:
    return (token["id"] for token in added.values())


def read_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.model`, a protocol buffer. Raises InputError when it is damaged or no BPE."""
    try:
        data = path.read_bytes()
        model = _fields(data)
        trainer, normalizer = (_fields(model.get(field, [b""])[-1]) for field in (2, 3))
        pieces = []
        for raw in model.get(1, []):
            piece = _fields(raw)
            score = struct.unpack("<f", piece.get(2, [b"\0\0\0\0"])[-1])[0]
            pieces.append(SentencePiece(piece[1][-1].decode(), score, piece.get(3, [1])[-1]))
        kind = trainer.get(3, [1])[-1]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise InputError(f"{path} is not a SentencePiece model; download it again.") from None
    if not any(piece.kind == _UNKNOWN for piece in pieces):  # which each has
        raise InputError(f"{path} is not a whole SentencePiece model; download it again.")
    if kind != 2:
        raise InputError(f"{path} is a SentencePiece model, but no BPE; use the checkpoint's own.")
    return build_sentencepiece(
        pieces, add_prefix=bool(normalizer.get(3, [1])[-1]), charsmap=normalizer.get(2, [b""])[-1]
    )


def _fields(data: Any) -> dict[int, list[Any]]:
    """The fields of a protocol buffer's message: number -> values, integers or bytes. Raises ValueError if cut off."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            value: Any = varint()
        elif wire in (1, 2, 5):
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError
        else:
            raise ValueError
        found.setdefault(number, []).append(value)
    return found
