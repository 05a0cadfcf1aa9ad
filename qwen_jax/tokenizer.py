"""Text <-> ids: Qwen's byte-level BPE, from `tokenizer.json`, `qwen.tiktoken`, `vocab.json` or a GGUF's metadata.

All routes end in one Rust tokenizer (`tokenizers`), so the same text gives the same ids whatever file it came from.
"""

from __future__ import annotations

import base64
import codecs
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.spoken import Spoken

Generation = Literal["qwen1", "qwen1.5", "qwen2", "qwen2.5", "qwen2.5-math", "qwq", "qwen3"]
GENERATIONS: tuple[Generation, ...] = get_args(Generation)

# What transformers gives to chat templates by name.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Qwen1 to Qwen3; digits one at a time, and the leading space belongs to the word.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BASE = [END_OF_TEXT, IM_START, IM_END]
_VISION = """object_ref_start object_ref_end box_start box_end quad_start quad_end
    vision_start vision_end vision_pad image_pad video_pad"""
_QWEN25 = [
    *_BASE,
    *(f"<|{name}|>" for name in _VISION.split()),
    *("<tool_call>", "</tool_call>"),
    *(f"<|{name}|>" for name in "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()),
]
# Added tokens in id order; the first one's id is the number of ranks (151,643).
_ADDED: dict[Generation, list[str]] = {
    "qwen1": [*_BASE, *(f"<|extra_{i}|>" for i in range(205))],
    "qwen1.5": _BASE,
    "qwen2": _BASE,
    "qwen2.5": _QWEN25,
    "qwen2.5-math": _QWEN25,
    "qwq": _QWEN25,
    "qwen3": [*_QWEN25, "<tool_response>", "</tool_response>", "<think>", "</think>"],
}
# Parsed as one token like the special ones, but kept when decoding skips special tokens (as in Qwen's tokenizer.json).
_NOT_SPECIAL = frozenset(_ADDED["qwen3"][_QWEN25.index("<tool_call>") :])


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's byte -> printable character map: printable Latin-1 stands for itself, the rest is moved to U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(moved)}


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {ord(char): chr(byte) for byte, char in _BYTE_TO_CHAR.items()}


def _to_chars(token: bytes) -> str:
    return token.decode("latin-1").translate(_BYTE_TO_CHAR)


def _to_bytes(chars: str) -> bytes:
    return chars.translate(_CHAR_TO_BYTE).encode("latin-1")


class Tokenizer:
    """Text <-> ids. `len(tokenizer)` ids exist; a model's logits beyond that are padding rows, never to be sampled.

    special_tokens: every added token (text -> id), `<tool_call>` and `<think>` included.
    special_ids:    the subset that decoding drops with `skip_special`: control tokens, not `<tool_call>`.
    eos_ids:        what ends a text: the end-of-sequence token the checkpoint declares, then `<|endoftext|>`.
    chat_template:  the checkpoint's own jinja template, or None.
    named_tokens:   what the checkpoint calls its tokens ("eos_token" -> text), for chat templates.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        chat_template: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._plain = tokenizers.Tokenizer(backend.model)  # the same vocabulary in memory, without the added tokens
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        added = backend.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {added[id].content: id for id in sorted(added)}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self._longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, self._longest_first)))
        if END_OF_TEXT not in self.special_tokens:
            raise InputError(f"this is not a Qwen tokenizer: it has no {END_OF_TEXT} token; use the checkpoint's own.")
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=False), 1 + max(added))
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_ids, self.special_tokens[END_OF_TEXT]]))
        self.pad_id: int = self.special_tokens[END_OF_TEXT] if pad_id is None else pad_id
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {})
        for id in (*self.eos_ids, self.pad_id):
            self._check_id(id)

    # --- constructors -------------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A new tokenizer of `vocab_size` ids, learned from texts: Qwen's rules, and at the end Qwen2.5's added tokens.

        Raises InputError when there is no room for the 256 bytes and the added tokens.
        """
        added = _ADDED["qwen2.5"]
        if vocab_size < (least := 256 + len(added)):
            raise InputError(f"a vocabulary of {vocab_size} has no room for the bytes; it needs at least {least} ids.")
        backend = _build({}, [], [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(added), initial_alphabet=list(_BYTE_TO_CHAR.values()), show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_tokens(
            [tokenizers.AddedToken(text, normalized=False, special=text not in _NOT_SPECIAL) for text in added]
        )
        return cls(backend)

    @classmethod
    def from_json(cls, path: str | Path) -> Tokenizer:
        """From a `tokenizer.json`; the files beside it give the chat template and the end-of-sequence ids.

        Raises InputError when the file is missing, damaged or not a byte-level BPE.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} does not exist; a model folder needs its tokenizer.json.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise InputError(f"{path} is not a tokenizer.json ({error}); download it again.") from None
        if type(backend.model).__name__ != "BPE" or type(backend.decoder).__name__ != "ByteLevel":
            raise InputError(
                f"{path} is not a byte-level BPE, which every Qwen tokenizer is; use the checkpoint's own."
            )
        return cls(backend, **_declared(path.parent, backend))

    @classmethod
    def from_tiktoken(cls, path: str | Path, generation: Generation) -> Tokenizer:
        """From a `qwen.tiktoken` file (a base64 token and its rank per line) and the generation's added tokens.

        The merges are reconstructed from the ranks (about 2 s). Raises InputError on a missing or damaged file.
        """
        if generation not in GENERATIONS:
            raise InputError(f"unknown generation {generation!r}; known: {', '.join(GENERATIONS)}.")
        path = Path(path)
        ranks = _read_ranks(path)
        vocab = {_to_chars(token): rank for token, rank in ranks.items()}
        merges = [f"{_to_chars(a)} {_to_chars(b)}" for a, b in merges_from_ranks(ranks)]
        backend = _build(vocab, merges, [(text, text not in _NOT_SPECIAL) for text in _ADDED[generation]])
        return cls(backend, **_declared(path.parent, backend))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF file's key-value metadata (`tokenizer.ggml.*`, `tokenizer.chat_template`).

        Raises InputError when the vocabulary is missing or of another family.
        """
        kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "qwen2")
        if kind != "gpt2" or pre != "qwen2":
            raise InputError(
                f"the GGUF holds a {kind!r}/{pre!r} tokenizer, not Qwen's 'gpt2'/'qwen2'; use a Qwen GGUF."
            )
        keys = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
        if missing := [key for key in keys if key not in metadata]:
            raise InputError(f"the GGUF lacks {', '.join(missing)}; use a file that embeds its vocabulary.")
        tokens, types, merges = (list(metadata[key]) for key in keys)
        # Normal tokens, added ones (3 control, 4 user-defined), padding rows (5 unused). Early converters wrote
        # the padding rows as user-defined tokens named after their ids.
        group = {1: 0, 3: 1, 4: 1, 5: 2}
        groups = [
            2 if token == f"[PAD{id}]" else group.get(kind, 3)
            for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        ]
        if groups != sorted(groups) or 3 in groups:
            raise InputError(
                "the GGUF's token types are not in Qwen's order (ranks, added tokens, padding); use a Qwen GGUF."
            )
        end, added_end = groups.count(0), len(groups) - groups.count(2)
        vocab = {token: id for id, token in enumerate(tokens[:end])}
        added = [(tokens[id], types[id] == 3) for id in range(end, added_end)]
        backend = _build(vocab, merges, added)
        eos, pad = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "padding"))
        return cls(
            backend,
            eos_ids=[] if eos is None else [int(eos)],
            pad_id=None if pad is None else int(pad),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    # --- text -> ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Ids of `text`, normalised to NFC; nothing is added in front or behind.

        With `allow_special=False` the text of an added token (`<|im_end|>`, `<tool_call>`) is ordinary text, so that
        untrusted text cannot forge a turn. In a rendered prompt, a `Spoken`, it is so where the text is untrusted.
        """
        _check_text(text)
        if not allow_special:
            return [id for id, *_ in self._encode_plain(text)]
        if isinstance(text, Spoken):
            return self.encode_spoken(text)[0]
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_spoken(self, text: Spoken) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered prompt, and the characters (start, end) of each.

        Where no untrusted text spells an added token, they are the ids of the string. Raises InputError where it is
        not known who spelled one.
        """
        encoding = self._backend.encode(str.__str__(text), add_special_tokens=False)
        pieces = [piece for piece in text.pieces for _ in piece.text]
        added = zip(encoding.ids, encoding.offsets, strict=True)
        if all(pieces[i].trusted for id, (start, end) in added if id in self._added_ids for i in range(start, end)):
            return encoding.ids, encoding.offsets
        found: list[tuple[int, int, int]] = []
        done = position = 0
        while match := self._added_pattern.search(text, position):
            start = position = match.start()
            for token in self._longest_first:
                span = pieces[start : start + len(token)]
                if not text.startswith(token, start):
                    continue
                if any(piece.speaker == "unknown" for piece in span):
                    raise InputError(
                        f"the chat template hides who wrote {token!r}, so that it could be forged; use another."
                    )
                if all(piece.trusted for piece in span):
                    found += self._encode_plain(text, done, start)
                    done = position = start + len(token)
                    found.append((self.special_tokens[token], start, done))
                    break
            else:
                position += 1
        found += self._encode_plain(text, done, len(text))
        return [id for id, *_ in found], [(start, end) for _, start, end in found]

    def _encode_plain(self, text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int, int]]:
        """Ids of text[start:end] without added tokens, and the characters (start, end) of each."""
        encoding = self._plain.encode(str.__str__(text)[start:end], add_special_tokens=False)
        found = [(id, start + a, start + b) for id, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)]
        for id, a, b in found:  # where the vocabulary itself spells out an added token, its text is taken apart
            if id in self._added_ids and b - a > 1:
                return self._encode_plain(text, start, a + 1) + self._encode_plain(text, a + 1, end)
        return found

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        for text in texts:
            _check_text(text)
        backend = self._backend if allow_special else self._plain
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    # --- ids -> text --------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises InputError on an id without a token."""
        decoder = self.stream(skip_special=skip_special)
        return "".join([decoder.add(id) for id in ids]) + decoder.flush()

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """An incremental `decode`: the pieces it returns, joined, are `decode` of all ids."""
        return StreamDecoder(self, skip_special=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token `id` stands for. Raises InputError on an id without a token."""
        self._check_id(id)
        return self._bytes[id]

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        added = {id: text.encode() for text, id in self.special_tokens.items()}
        tokens = (self._backend.id_to_token(id) for id in range(self.vocab_size))
        return [added[id] if id in added else _to_bytes(token or "") for id, token in enumerate(tokens)]

    def _check_id(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise InputError(
                f"token id {id} has no text: the tokenizer's ids end at {self.vocab_size - 1}; "
                "rows of the model beyond that are padding, so mask them when sampling."
            )

    def __len__(self) -> int:
        return self.vocab_size

    # --- to disk ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, vocab.json and merges.txt, as `AutoTokenizer` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        self._backend.model.save(str(folder))
        flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
        added = sorted(self._backend.get_added_tokens_decoder().items())
        config = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(id): {"content": token.content} | {flag: getattr(token, flag) for flag in flags}
                for id, token in added
            },
            "additional_special_tokens": [
                token.content for _, token in added if token.special and token.content != END_OF_TEXT
            ],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": self._backend.id_to_token(self.eos_ids[0]),
            "errors": "replace",
            "pad_token": self._backend.id_to_token(self.pad_id),
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


class StreamDecoder:
    """Ids in, text out, one token at a time; the bytes of an unfinished character wait for the rest."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        """The text that `id` completes: empty while a character is unfinished."""
        return "" if id in self._skipped else self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the decoder then starts afresh."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer of a model folder (tokenizer.json, else qwen.tiktoken, else vocab.json + merges.txt) or a .gguf file.

    Raises InputError when there is none or it is not Qwen's.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        from qwen_jax.weights.gguf import read_metadata

        return Tokenizer.from_gguf_metadata(read_metadata(path))
    if not path.is_dir():
        raise InputError(f"{path} is neither a model folder nor a .gguf file; give one of these.")
    if (path / "tokenizer.json").exists():
        return Tokenizer.from_json(path / "tokenizer.json")
    if (path / "qwen.tiktoken").exists():
        # Only Qwen1 ships this file, and the file itself does not say which added tokens follow its ranks
        model_type = _read_json(path / "config.json").get("model_type", "qwen")
        if model_type != "qwen":
            raise InputError(
                f"{path} has qwen.tiktoken, which is Qwen1's, but its config.json says model_type {model_type!r}; "
                "add the checkpoint's tokenizer.json."
            )
        return Tokenizer.from_tiktoken(path / "qwen.tiktoken", "qwen1")
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return _from_vocab_and_merges(path)
    raise InputError(f"{path} has no tokenizer (tokenizer.json, qwen.tiktoken, or vocab.json and merges.txt); add one.")


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises InputError when the tokenizer has ids that the model has no row for."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {config.vocab_size} rows (vocab_size); "
            "use the tokenizer of this checkpoint."
        )


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


def _read_ranks(path: Path) -> dict[bytes, int]:
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


def _build(vocab: dict[str, int], merges: Sequence[str], added: Iterable[tuple[str, bool]]) -> tokenizers.Tokenizer:
    """The Rust tokenizer. `merges` are "left right"; `added` are (text, special), their ids follow the vocabulary."""
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        backend = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(
            f"vocabulary and merges do not belong together ({error}); use one checkpoint's files."
        ) from None
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


def _from_vocab_and_merges(folder: Path) -> Tokenizer:
    vocab = _read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    declared = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    by_id = sorted((int(id), token["content"], token["special"]) for id, token in declared.items())
    by_id = by_id or [(len(vocab) + i, text, True) for i, text in enumerate(_BASE)]
    if [id for id, *_ in by_id] != list(range(len(vocab), len(vocab) + len(by_id))):
        raise InputError(
            f"{folder}: the ids of added_tokens_decoder do not follow vocab.json's; add the tokenizer.json."
        )
    backend = _build(vocab, merges, [(text, special) for _, text, special in by_id])
    return Tokenizer(backend, **_declared(folder, backend))


def _declared(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """What the files of a model folder say about ends, padding and chat: keyword arguments of Tokenizer."""
    config = _read_json(folder / "tokenizer_config.json")
    eos = _read_json(folder / "generation_config.json").get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    tokens = {}
    for name in ("eos_token", "pad_token"):
        token = config.get(name)
        text = token["content"] if isinstance(token, dict) else token
        tokens[name] = None if text is None else backend.token_to_id(text)
        if text is not None and tokens[name] is None:
            raise InputError(f"{folder}: tokenizer_config.json names the {name} {text!r}, which the vocabulary lacks.")
    if tokens["eos_token"] is not None:
        eos_ids = [tokens["eos_token"], *eos_ids]
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():  # where newer transformers puts it
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    named = {
        name: token["content"] if isinstance(token, dict) else token
        for name in NAMED_TOKENS
        if (token := config.get(name)) is not None
    }
    return {"eos_ids": eos_ids, "pad_id": tokens["pad_token"], "chat_template": template, "named_tokens": named}


def _read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, empty when there is no file."""
    try:
        mapping = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(mapping, dict):
        raise InputError(f"{path} must hold one JSON object; download it again.")
    return mapping


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), which UTF-8 "
            "cannot hold; remove it or replace it by U+FFFD."
        ) from None
