"""The text of an answer as its tokens come, with stops that hold special tokens."""

import pytest

from infer.stops import AnswerText
from tests.infer import tiny

TOKENIZER = tiny.tokenizer()
ENDOFTEXT, IM_START, IM_END = 260, 261, 262


def answer(text, stop, stop_ids=(IM_END,), limit=100):
    """(text, finish reason, how many tokens were taken) of an answer with the tokens of `text`."""
    out = AnswerText(TOKENIZER, stop, stop_ids, limit)
    ids, shown = TOKENIZER.encode(text), ""
    for count, id in enumerate(ids, 1):
        shown += out.add(id)
        if out.finish_reason:
            return shown, out.finish_reason, count
    return shown, None, len(ids)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("AB<|im_start|>CD", ["<|im_start|>"], "AB"),
        ("AB<|im_start|>CD", ["B<|im_start|>"], "A"),
        ("AB<|im_start|>CD", ["<|im_start|>C"], "AB"),
        ("AB<|im_start|>CD", ["start"], "AB"),
        ("AB<|im_start|><|endoftext|>CD", ["<|im_start|><|endoftext|>C"], "AB"),
        ("AB<|im_end|>", ["B<|im_end|>"], "A"),  # also where a stop id ends it
        ("AB<|im_start|>CD<|im_end|>", ["BC"], "ABCD"),  # they do not touch
        ("AB<|im_start|>CD<|im_end|>", ["<|im_start|>D", "<|im_end|>x"], "ABCD"),
        ("é<|im_start|>世<|im_end|>", ["<|im_start|>世"], "é"),
    ],
)
def test_stops_with_special_tokens(text, stop, expected):
    shown, reason, _ = answer(text, stop)
    assert (shown, reason) == (expected, "stop")


def test_special_tokens_are_not_shown():
    assert answer("A<|im_start|>B<|im_end|>", [])[:2] == ("AB", "stop")
    assert answer("A<|im_start|>B", [], limit=3) == ("AB", "length", 3)


def test_a_special_token_within_a_character():
    out = AnswerText(TOKENIZER, [], (IM_END,), 100)
    first, second = TOKENIZER.encode("é")
    assert "".join(map(out.add, (first, IM_START, second))) == "é"
