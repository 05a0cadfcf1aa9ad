"""Grammars admit what they describe, token by token, and refuse what is none with a sentence."""

import json

import numpy as np
import pytest

from infer import grammar
from infer.grammar import Grammar
from qwen_jax.errors import InputError
from tests.infer import tiny

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.eos_ids[0]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"name": "weather", "parameters": {**PERSON, "$defs": {"a": {"type": "string"}}}},
    {"name": "now"},
]


def admits(words: np.ndarray, id: int) -> bool:
    return bool(words[id // 32] >> np.uint32(id % 32) & 1)


def accepts(source: str, text: str) -> bool:
    """Whether each token of the text is among those allowed, and then the end."""
    matcher = Grammar(TOKENIZER, [END], source).matcher()
    for id in TOKENIZER.encode(text):
        if not admits(matcher.allowed(), id):
            return False
        matcher.advance(id)
    return admits(matcher.allowed(), END)


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (grammar.json_schema(PERSON), '{"name": "thä", "age": 3}', '{"name": 3, "age": 3}'),
        (grammar.json_schema({"type": "object"}), '{"a": [1, {"b": null}]}', "[1]"),
        (grammar.regex("[0-9]{3}-a+b"), "123-aab", "12-ab"),
        (grammar.choice(["yes", 'no "x"\n']), 'no "x"\n', "maybe"),
        (grammar.lark('start: "the" (" in")*'), "the in in", "in"),
        (
            grammar.tool_calls(TOKENIZER, TOOLS, parallel=True),
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "weather", "arguments": {"name": "er", "age": 1}}\n</tool_call>',
            '<tool_call>\n{"name": "then", "arguments": {}}\n</tool_call>',
        ),
    ],
)
def test_what_a_grammar_admits(source: str, good: str, bad: str) -> None:
    assert accepts(source, good)
    assert not accepts(source, bad)
    assert not accepts(source, good[:-1])


def deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "foo"}, "foo"),
        ({"$ref": "#"}, "no text"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text"),
        ({"$ref": "https://example.com/x.json"}, "example.com"),
        (deep(200), "deeper"),
        (deep(3200), "deeper"),
        ({"enum": [f"value {i} {'x' * 40}" for i in range(2000)]}, "too large"),
    ],
)
def test_what_is_no_schema_is_refused(schema: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Grammar(TOKENIZER, [END], grammar.json_schema(schema))


def test_a_tool_that_cannot_be_called_is_named() -> None:
    with pytest.raises(InputError, match="'broken'"):
        grammar.tool_calls(TOKENIZER, [TOOLS[1], {"name": "broken", "parameters": deep(100)}], parallel=True)


def test_random_answers_have_the_form() -> None:
    """Whatever is drawn from what is allowed, the whole is JSON of the schema."""
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "size": {"type": "integer"},
            "tags": {"items": {"type": "boolean"}},
        },
        "required": ["kind", "size"],
        "additionalProperties": False,
    }
    compiled, rng = Grammar(TOKENIZER, [END], grammar.json_schema(schema)), np.random.default_rng(0)
    finished = 0
    for _ in range(40):
        matcher, ids = compiled.matcher(), []
        while len(ids) < 400:
            words = matcher.allowed()
            id = int(rng.choice([id for id in range(len(TOKENIZER)) if admits(words, id)]))
            if id == END:
                found = json.loads(TOKENIZER.decode(ids))
                assert found["kind"] in "ab" and isinstance(found["size"], int)
                finished += 1
                break
            ids.append(id)
            matcher.advance(id)
    assert finished > 20
