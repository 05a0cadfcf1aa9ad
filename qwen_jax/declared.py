"""What the files of a model folder say about its tokenizer, taken as `transformers` takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qwen_jax.checked import read_mapping, read_text, shown, whole
from qwen_jax.errors import InputError

# What transformers gives to chat templates by name.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# What the class Qwen2Tokenizer is called with where the file does not say.
_QWEN2: dict[str, Any] = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")


def declare(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Adds the tokens that the folder's files declare to `backend`; returns keyword arguments of `Tokenizer`.

    Tokens are those of tokenizer_config.json's added_tokens_decoder or else of added_tokens.json, then the named ones
    (eos_token, ...), then the extra ones. Raises InputError when a file cannot be read so.
    """
    try:
        return _declare(folder, backend)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise InputError(
            f"{folder}: the files beside the tokenizer declare its tokens in an unknown way ({shown(error)}); "
            "download them again."
        ) from None


def _declare(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    config = read_mapping(folder / "tokenizer_config.json")
    # a file that says all its tokens is newer than the other two
    says_all = "added_tokens_decoder" in config
    if not says_all:
        config |= read_mapping(folder / "special_tokens_map.json")
    if (config.get("tokenizer_class") or "Qwen2Tokenizer").startswith("Qwen2Tokenizer"):
        known = backend.token_to_id("<|endoftext|>") is not None
        config = (_QWEN2 if known else {}) | config
    named = {name: _added(config[name], special=True) for name in NAMES if config.get(name) is not None}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = [_added(token, special=True) for token in (extra.values() if isinstance(extra, Mapping) else extra)]
    special = {token.content for token in (*named.values(), *extra)}
    if says_all:
        by_id = {int(id): _added(token) for id, token in config["added_tokens_decoder"].items()}
    else:
        texts = read_mapping(folder / "added_tokens.json")
        by_id = {
            whole(f"{folder}: the id of the added token {shown(text)}", id, least=0): _added(
                {"content": text, "special": text in special}
            )
            for text, id in texts.items()
        }
    _add(backend, (token for _, token in sorted(by_id.items(), key=lambda item: item[0])))
    for id, token in by_id.items():
        if (found := backend.token_to_id(token.content)) != id:
            raise InputError(
                f"{folder}: the token {shown(token.content)} is declared with id {id}, but is {found} in the "
                "vocabulary; use the checkpoint's own files."
            )
    _add(backend, (*named.values(), *extra))
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    ids = {name: backend.token_to_id(token.content) for name, token in named.items()}
    if lost := [name for name, id in ids.items() if id is None]:
        raise InputError(
            f"{folder}: {lost[0]} is {shown(named[lost[0]].content)}, which is no token; correct the file."
        )
    declared = token_ids(read_mapping(folder / "generation_config.json").get("eos_token_id"))
    return {
        "eos_ids": [*([ids["eos_token"]] if "eos_token" in ids else []), *declared],
        "pad_id": ids.get("pad_token"),
        "chat_template": _templates(folder, config.get("chat_template")),
        "named_tokens": {name: token.content for name, token in named.items()},
    }


def _added(token: Any, *, special: bool = False) -> tokenizers.AddedToken:
    """A token as JSON has it, text or an object with flags."""
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=special)
    flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
    return tokenizers.AddedToken(token["content"], **{"special": special} | flags)


def _add(backend: tokenizers.Tokenizer, tokens: Iterable[tokenizers.AddedToken]) -> None:
    """Adds the tokens that are not there; of those that are, some become special."""
    there = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        if token.content not in there or (token.special and not there[token.content].special):
            backend.add_tokens([token])


def token_ids(value: Any) -> list[int]:
    """generation_config.json's eos_token_id: an id, several, or null for none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(id) is not int for id in ids):
        raise InputError(
            f"generation_config.json: eos_token_id={shown(value)} is not possible; it must be an id or a list."
        )
    return ids


def _templates(folder: Path, in_config: Any) -> str | dict[str, str] | None:
    """The chat template, or several by name: files of their own go before the tokenizer's configuration."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: read_text(file) for name, file in files.items() if file.is_file()}
    if not found and isinstance(in_config, list):
        found = {entry["name"]: entry["template"] for entry in in_config}
    elif not found and in_config is not None:
        found = in_config if isinstance(in_config, dict) else {"default": in_config}
    if not all(isinstance(template, str) for template in found.values()):
        raise InputError(f"{folder}: a chat template must be text; download tokenizer_config.json again.")
    return found["default"] if [*found] == ["default"] else found or None
