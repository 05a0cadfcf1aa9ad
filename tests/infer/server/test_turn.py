"""A turn's text is told apart into the same reasoning, content and calls, however it comes in pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.server.turn import Turn

CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Pa}ris\\"", "a": [{}, {"b": 1}]}}\n</tool_call>'
TURNS = [
    ("Hello <tool\n  world </think> x", {"has_tools": True}, {"content": "Hello <tool\n  world </think> x"}),
    (
        f'I will look.\n{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
        {"has_tools": True},
        {"content": "I will look.", "get": '{"city": "Pa}ris\\"", "a": [{}, {"b": 1}]}', "now": "{}"},
    ),
    (CALL, {}, {"content": CALL}),
    ("<think>\nhmm\n\n</think>\n\nIt is\n 3.", {"thinks": True}, {"reasoning": "hmm", "content": "It is\n 3."}),
    ("hmm\n</think>\n\nIt is", {"thinks": True, "is_thinking": True}, {"reasoning": "hmm", "content": "It is"}),
    ("<think>only", {"thinks": True}, {"reasoning": "only"}),
    ("<thing>", {"thinks": True}, {"content": "<thing>"}),
    (
        '<tool_call>\n{"arguments": {"x": 1}, "name": "f"}\n</tool_call> ok',
        {"has_tools": True},
        {"f": '{"x": 1}', "content": " ok"},
    ),
    ("a <tool_call>\nno json</tool_call> b", {"has_tools": True}, {"content": "a <tool_call>\nno json</tool_call> b"}),
    ("a <tool_call>", {"has_tools": True}, {"content": "a <tool_call>"}),
    ('<tool_call>{"name": "f", "arguments": {"x": "unfin', {"has_tools": True}, {"f": '{"x": "unfin'}),
]


@pytest.mark.parametrize(("text", "options", "expected"), TURNS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_turn_in_pieces(text: str, options: dict, expected: dict, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    turn, deltas = Turn(**options), []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        deltas += turn.add(text[begin:end])
    deltas += turn.end()
    found: dict[str, str] = {}
    names = []
    for delta in deltas:
        if delta.kind == "call":
            assert delta.index == len(names)
            names.append(delta.text)
            found[delta.text] = ""
        else:
            name = names[delta.index] if delta.kind == "arguments" else delta.kind
            found[name] = found.get(name, "") + delta.text
    assert found == expected
    assert turn.num_calls == len(names)
