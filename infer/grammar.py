"""What an answer may look like: JSON schemas, regular expressions and grammars, as masks over the next token."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from qwen_jax.tokenizer import Tokenizer

# A compiler takes about 10 us a byte, and nested schemas far more: larger or deeper ones are refused.
MAX_BYTES, MAX_DEPTH = 64 * 1024, 32
# JSON on one line: free white space between its parts a model could write for ever.
_JSON = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


class Grammar:
    """One form, compiled for a tokenizer; `matcher()` gives the state of an answer that begins."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], source: str) -> None:
        """source: what a function below writes. Raises InputError where it is none, or matches no text."""
        from llguidance import LLMatcher

        self._tokens = _tokens_of(tokenizer, tuple(sorted(set(stop_ids))))
        if len(source) > 4 * MAX_BYTES:
            raise InputError(f"a grammar of {len(source)} bytes is too large; at most {4 * MAX_BYTES} are compiled.")
        if problem := LLMatcher.validate_grammar(source, self._tokens):
            raise InputError(f"the schema or grammar is not possible: {_brief(problem)}")
        self._matcher = LLMatcher(self._tokens, source, log_level=0)
        first = self.matcher()
        first.allowed()
        if first.is_stuck:
            raise InputError("the schema or grammar matches no text at all, such as one that only refers to itself.")

    def matcher(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._tokens)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, tokens: LLTokenizer) -> None:
        self._matcher, self._tokens = matcher, tokens

    @property
    def is_stuck(self) -> bool:
        """Whether nothing can follow, though the text is not whole."""
        return self._matcher.is_stopped() and not self._matcher.is_accepting()

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, as bits of uint32 [ceil(V / 32)]; those that end an answer where it may end."""
        import llguidance.numpy

        words = np.zeros((1, -(-self._tokens.vocab_size // 32)), np.uint32)
        if not self._matcher.is_stopped():
            llguidance.numpy.fill_next_token_bitmask(self._matcher, words.view(np.int32), 0)
        if self._matcher.is_stopped():  # before, or because nothing follows
            ends = np.array(self._tokens.eos_tokens)
            np.bitwise_or.at(words[0], ends // 32, np.uint32(1) << (ends % 32).astype(np.uint32))
        return words[0]

    def advance(self, id: int) -> None:
        """Takes the next token of the answer in. Raises InputError where it does not fit."""
        if not self._matcher.consume_token(id) and not self._matcher.is_stopped():
            raise InputError(f"an answer left its grammar: {_brief(self._matcher.get_error() or 'no reason given')}")


def json_schema(schema: Mapping[str, Any] | bool) -> str:
    """The source of a grammar for JSON that a schema describes. Raises InputError for one that is too large."""
    from llguidance import LLMatcher

    check_schema(schema)
    return LLMatcher.grammar_from_json_schema(
        json.dumps({**schema, **_JSON} if isinstance(schema, Mapping) else schema)
    )


def check_schema(schema: Any) -> None:
    """Raises InputError for a schema that is none, too large or too deep."""
    if not isinstance(schema, Mapping | bool):
        raise InputError(f"a JSON schema must be an object, got {type(schema).__name__}.")
    todo, depth = [schema], 0
    while todo:
        depth += 1
        if depth > MAX_DEPTH * 2:  # an object and its properties are two levels of JSON
            raise InputError(f"a JSON schema is nested deeper than {MAX_DEPTH} levels.")
        todo = [
            inner
            for outer in todo
            for inner in (outer.values() if isinstance(outer, Mapping) else outer if isinstance(outer, list) else ())
            if isinstance(inner, Mapping | list)
        ]
    if (size := len(json.dumps(schema))) > MAX_BYTES:
        raise InputError(f"a JSON schema of {size} bytes is too large; at most {MAX_BYTES} are compiled.")


def regex(pattern: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


def choice(texts: Sequence[str]) -> str:
    """The source of a grammar for one of these texts."""
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError("choice must be a list of at least one text, none of them empty.")
    return lark("start: " + " | ".join(json.dumps(text) for text in texts))


def lark(source: str) -> str:
    """The source of a grammar in Lark's form, as llguidance reads it."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(source)


def tool_calls(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> str:
    """One call, or with `parallel` several, of these functions ({"name", "parameters"}) in Qwen2.5's form."""
    begin, end = (
        mark if mark in tokenizer.special_tokens else json.dumps(mark) for mark in ("<tool_call>", "</tool_call>")
    )
    rules = []
    for i, tool in enumerate(tools):
        parameters = tool.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        try:
            check_schema(parameters)
        except InputError as error:
            raise InputError(f"the parameters of the tool {tool['name']!r} are not possible: {error}") from error
        schema = {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": {"type": "object", **parameters}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
            **_definitions(parameters),
            **_JSON,
        }
        rules.append(f"call{i}: %json {json.dumps(schema, ensure_ascii=False)}")
    body = " | ".join(f"call{i}" for i in range(len(tools)))
    more = ' ("\\n" call)*' if parallel else ""
    form = ["start: call" + more, f'call: {begin} "\\n" body "\\n" {end}', f"body: {body}", *rules]
    return lark("\n".join(form))


def _definitions(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What "#/$defs/..." of a tool's own schema refers to, which stands one level deeper in that of a call."""
    return {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}


def _brief(problem: str) -> str:
    line = " ".join(problem.split())
    return line if len(line) <= 300 else line[:300] + "..."


@functools.lru_cache(maxsize=4)
def _tokens_of(tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, stop_ids)), eos_token=list(stop_ids))


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(id) for id in range(len(tokenizer))]
        # <tool_call> and the like too, which a grammar names and no text of an answer holds
        self.special_token_ids = sorted({*tokenizer.special_ids, *tokenizer.special_tokens.values()})

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text, allow_special=False)
