"""Text <-> ids: Qwen's byte-level BPE, from `tokenizer.json`, `qwen.tiktoken`, `vocab.json` or a GGUF's metadata.

All routes end in one Rust tokenizer (`tokenizers`), so the same text gives the same ids whatever file it came from.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tokenizers
from tokenizers import trainers

from qwen_jax.checked import read_mapping, read_text, shown
from qwen_jax.config import ModelConfig
from qwen_jax.declared import declare
from qwen_jax.errors import InputError
from qwen_jax.spoken import Spoken
from qwen_jax.vocabulary import (
    BYTE_TO_CHAR,
    SPACE,
    SentencePiece,
    build,
    build_sentencepiece,
    merges_from_ranks,
    pieces_of,
    read_ranks,
    read_sentencepiece,
    refusing,
    to_bytes,
    to_chars,
)

Generation = Literal["qwen1", "qwen1.5", "qwen2", "qwen2.5", "qwen2.5-math", "qwq", "qwen3"]
GENERATIONS: tuple[Generation, ...] = get_args(Generation)

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

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


class Tokenizer:
    """Text <-> ids. `len(tokenizer)` ids exist; a model's logits beyond that are padding rows, never to be sampled.

    special_tokens: every added token (text -> id), `<tool_call>` and `<think>` included.
    special_ids:    the subset that decoding drops with `skip_special`: control tokens, not `<tool_call>`.
    eos_ids:        what ends a text: the end-of-sequence tokens the checkpoint declares, then `<|endoftext|>`.
    chat_template:  the checkpoint's own jinja template, several by name, or None.
    named_tokens:   what the checkpoint calls its tokens ("eos_token" -> text), for chat templates.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        chat_template: str | Mapping[str, str] | None = None,
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
        ends = [*eos_ids, *([self.special_tokens[END_OF_TEXT]] if END_OF_TEXT in self.special_tokens else [])]
        if not ends:
            raise InputError(
                f"this is not a Qwen tokenizer: it has no {END_OF_TEXT} token and its files declare no eos_token; use "
                "the checkpoint's own."
            )
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=False), 1 + max(added, default=-1))
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self.pad_id: int = self.end_of_text_id if pad_id is None else pad_id
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {})
        for id in (*self.eos_ids, self.pad_id):
            self._check_id(id)

    @property
    def end_of_text_id(self) -> int:
        """What stands between documents: `<|endoftext|>`, or the end that a fine-tune has instead."""
        return self.special_tokens.get(END_OF_TEXT, self.eos_ids[0])

    # --- constructors -------------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A new tokenizer of `vocab_size` ids, learned from texts: Qwen's rules, and at the end Qwen2.5's added tokens.

        Raises InputError when there is no room for the 256 bytes and the added tokens.
        """
        added = _ADDED["qwen2.5"]
        if vocab_size < (least := 256 + len(added)):
            raise InputError(f"a vocabulary of {vocab_size} has no room for the bytes; it needs at least {least} ids.")
        backend = build({}, [], [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(added), initial_alphabet=list(BYTE_TO_CHAR.values()), show_progress=False
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
        with refusing(f"{path} is not a tokenizer.json", "download it again"):
            backend = tokenizers.Tokenizer.from_file(str(path))
        if type(backend.model).__name__ != "BPE" or backend.decoder is None:
            raise InputError(f"{path} is not a BPE, which every Qwen tokenizer is; use the checkpoint's own.")
        return cls(backend, **declare(path.parent, backend))

    @classmethod
    def from_tiktoken(cls, path: str | Path, generation: Generation) -> Tokenizer:
        """From a `qwen.tiktoken` file (a base64 token and its rank per line) and the generation's added tokens.

        The merges are reconstructed from the ranks (about 2 s). Raises InputError on a missing or damaged file.
        """
        if generation not in GENERATIONS:
            raise InputError(f"unknown generation {generation!r}; known: {', '.join(GENERATIONS)}.")
        path = Path(path)
        ranks = read_ranks(path)
        vocab = {to_chars(token): rank for token, rank in ranks.items()}
        merges = [f"{to_chars(a)} {to_chars(b)}" for a, b in merges_from_ranks(ranks)]
        backend = build(vocab, merges, [(text, text not in _NOT_SPECIAL) for text in _ADDED[generation]])
        return cls(backend, **declare(path.parent, backend))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF file's key-value metadata (`tokenizer.ggml.*`, `tokenizer.chat_template`).

        Raises InputError when the vocabulary is missing, damaged or of another family.
        """
        try:
            return cls._from_gguf(metadata)
        except (TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise InputError(f"the GGUF's vocabulary is damaged ({shown(str(error))}); download it again.") from None

    @classmethod
    def _from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "qwen2")
        if kind == "llama":
            return cls._from_gguf_pieces(metadata)
        if kind != "gpt2" or pre not in ("qwen2", "deepseek-r1-qwen"):  # which cut text alike
            raise InputError(
                f"the GGUF holds a {shown(kind)}/{shown(pre)} tokenizer, not Qwen's 'gpt2'/'qwen2'; use a Qwen GGUF."
            )
        keys = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
        if missing := [key for key in keys if key not in metadata]:
            raise InputError(f"the GGUF lacks {', '.join(missing)}; use a file that embeds its vocabulary.")
        tokens, types, merges = (list(metadata[key]) for key in keys)
        # Ranks (1), then added tokens (3 control, 4 user-defined) among padding rows (5 unused), which early converters
        # wrote as user-defined tokens named after their ids. Padding before a fine-tune's own tokens keeps its ids.
        end = next((id for id, kind in enumerate(types) if kind != 1), len(types))
        if not set(types[end:]) <= {3, 4, 5}:
            raise InputError("the GGUF's token types are not in Qwen's order (ranks, then others); use a Qwen GGUF.")
        used = [id for id in range(end, len(types)) if types[id] != 5 and tokens[id] != f"[PAD{id}]"]
        vocab = {token: id for id, token in enumerate(tokens[:end])}
        added = [(tokens[id], types[id] != 4 or id not in used) for id in range(end, max(used, default=-1) + 1)]
        backend = build(vocab, merges, added)
        return cls(backend, **_declared_by_gguf(metadata))

    @classmethod
    def _from_gguf_pieces(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF's SentencePiece vocabulary, CodeQwen1.5's."""
        keys = [f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")]
        if missing := [key for key in keys if key not in metadata]:
            raise InputError(f"the GGUF lacks {', '.join(missing)}; use a file that embeds its vocabulary.")
        columns = zip(*(metadata[key] for key in keys), strict=True)
        pieces = [SentencePiece(text, float(score), int(kind)) for text, score, kind in columns]
        while pieces and pieces[-1].kind == 5 and pieces[-1].text == f"[PAD{len(pieces) - 1}]":
            pieces.pop()  # rows of the model that have no token
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        return cls(build_sentencepiece(pieces, add_prefix=prefix), **_declared_by_gguf(metadata))

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
        tokens = (self._backend.id_to_token(id) or "" for id in range(self.vocab_size))
        to = to_bytes if self.is_byte_level else _piece_bytes
        return [added[id] if id in added else to(token) for id, token in enumerate(tokens)]

    @property
    def is_byte_level(self) -> bool:
        """Whether it is a BPE over bytes, as all are but CodeQwen1.5's."""
        return type(self._backend.decoder).__name__ == "ByteLevel"

    @functools.cached_property
    def drops_first_space(self) -> bool:
        """Whether the space that encoding puts in front of a text (SentencePiece's) is taken away again."""
        rules = json.loads(self._backend.decoder.__getstate__())  # type: ignore[union-attr]
        steps = rules.get("decoders", [rules])
        return any(step["type"] == "Strip" and step.get("start") for step in steps) or any(
            step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps
        )

    def _check_id(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise InputError(
                f"token id {id} has no text: the tokenizer's ids end at {self.vocab_size - 1}; "
                "rows of the model beyond that are padding, so mask them when sampling."
            )

    def __len__(self) -> int:
        return self.vocab_size

    # --- to disk ------------------------------------------------------------------------------------------------------

    def vocabulary(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The BPE ("vocab" and "merges") and the added tokens, as tokenizer.json has them."""
        described = json.loads(self._backend.to_str())
        return described["model"], described["added_tokens"]

    def pieces(self) -> list[SentencePiece]:
        """A vocabulary that is no byte-level BPE as SentencePiece has it, one piece for each id.

        Raises InputError when it does what SentencePiece's scores cannot say.
        """
        return pieces_of(json.loads(self._backend.to_str()))

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, vocab.json and merges.txt, as `AutoTokenizer` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        self._backend.model.save(str(folder))
        flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
        ends = {"eos_token": self.eos_ids[0], "pad_token": self.pad_id}
        names = self.named_tokens | {name: self._backend.id_to_token(id) for name, id in ends.items()}
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
            "bos_token": names.get("bos_token"),
            "clean_up_tokenization_spaces": False,
            "eos_token": names["eos_token"],
            "errors": "replace",
            "pad_token": names["pad_token"],
            "split_special_tokens": self._backend.encode_special_tokens,
            "tokenizer_class": "Qwen2Tokenizer" if self.is_byte_level else "PreTrainedTokenizerFast",
            "unk_token": names.get("unk_token"),
        }
        if isinstance(self.chat_template, str):
            config["chat_template"] = self.chat_template
        elif self.chat_template is not None:
            config["chat_template"] = [{"name": n, "template": t} for n, t in self.chat_template.items()]
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece: those of its text, or the one that `<0x0A>` names."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()


class StreamDecoder:
    """Ids in, text out, one token at a time; the bytes of an unfinished character wait for the rest."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = tokenizer.drops_first_space

    def add(self, id: int) -> str:
        """The text that `id` completes: empty while a character is unfinished."""
        text = "" if id in self._skipped else self._utf8.decode(self._tokenizer.token_bytes(id))
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the decoder then starts afresh."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _declared_by_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of Tokenizer."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    ids = {name: int(id) for name, id in ids.items() if id is not None}
    return {
        "eos_ids": [ids["eos_token"]] if "eos_token" in ids else [],
        "pad_id": ids.get("pad_token"),
        "chat_template": metadata.get("tokenizer.chat_template"),
        "named_tokens": {name: tokens[id] for name, id in ids.items() if 0 <= id < len(tokens)},
    }


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer of a model folder or a .gguf file.

    A folder's is its tokenizer.json, else qwen.tiktoken, else vocab.json and merges.txt, else tokenizer.model.

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
        model_type = read_mapping(path / "config.json").get("model_type", "qwen")
        if model_type != "qwen":
            raise InputError(
                f"{path} has qwen.tiktoken, which is Qwen1's, but its config.json says model_type {model_type!r}; "
                "add the checkpoint's tokenizer.json."
            )
        return Tokenizer.from_tiktoken(path / "qwen.tiktoken", "qwen1")
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return _from_vocab_and_merges(path)
    if (path / "tokenizer.model").exists():
        backend = read_sentencepiece(path / "tokenizer.model")
        return Tokenizer(backend, **declare(path, backend))
    raise InputError(
        f"{path} has no tokenizer (tokenizer.json, qwen.tiktoken, vocab.json and merges.txt, or tokenizer.model); "
        "add one."
    )


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises InputError when the tokenizer has ids that the model has no row for."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {config.vocab_size} rows (vocab_size); "
            "use the tokenizer of this checkpoint."
        )


def _from_vocab_and_merges(folder: Path) -> Tokenizer:
    vocab = read_mapping(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    config = read_mapping(folder / "tokenizer_config.json")
    says_all = "added_tokens_decoder" in config or (folder / "added_tokens.json").exists()
    backend = build(vocab, merges, [] if says_all else [(text, True) for text in _BASE])
    return Tokenizer(backend, **declare(folder, backend))


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), which UTF-8 "
            "cannot hold; remove it or replace it by U+FFFD."
        ) from None
