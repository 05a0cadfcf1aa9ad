"""`Spoken` against `str`: the same text from every operation, and each character's mark goes where it goes."""

import copy
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.spoken import Spoken, common_mark, mark, marks_of, quoted_mark, speak

# Two alphabets that look alike to no operation: what `a` spoke is in the first, what `b` spoke in the second, so that
# the text itself says whose each character is.
A, B = mark("user"), mark("template", trusted=True)
OF_A, OF_B = "abc \t", "ABC\n-"
texts = st.lists(st.text(OF_A, min_size=1, max_size=4) | st.text(OF_B, min_size=1, max_size=4), max_size=5).map("".join)
short = st.text(OF_A + OF_B, min_size=1, max_size=2)


def spoken(text: str) -> Spoken:
    return Spoken(text, "".join(A if char in OF_A else B for char in text))


def assert_spoken(result, expected) -> None:
    """`result` is `expected`, every string in it marked as its characters say."""
    assert result == expected
    if isinstance(expected, str):
        assert isinstance(result, Spoken)
        assert result.marks == spoken(expected).marks
    else:
        for one, other in zip(result, expected, strict=True):
            assert_spoken(one, other)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(texts, short, short, st.integers(-1, 3), st.slices(8), st.booleans())
def test_operations_are_those_of_str(text, part, other, count, piece, keep):
    one, two = spoken(text), spoken(part)
    for name, args in {
        "split": (part, count),
        "rsplit": (part, count),
        "splitlines": (keep,),
        "partition": (part,),
        "rpartition": (part,),
        "strip": (part,),
        "lstrip": (part,),
        "rstrip": (part,),
        "removeprefix": (part,),
        "removesuffix": (part,),
    }.items():
        assert_spoken(getattr(one, name)(*args), getattr(text, name)(*args))
    for name in ("split", "rsplit"):
        assert_spoken(getattr(one, name)(None, count), getattr(text, name)(None, count))
    for name in ("strip", "lstrip", "rstrip", "split"):
        assert_spoken(getattr(one, name)(), getattr(text, name)())
    assert_spoken(one.replace(part, spoken(other), count), text.replace(part, other, count))
    assert_spoken(one.replace("", spoken(other), count), text.replace("", other, count))
    assert_spoken(one[piece], text[piece])
    assert_spoken(list(one), list(text))
    assert_spoken(one + two, text + part)
    assert_spoken(one * count, text * count)
    assert_spoken(count * one, count * text)
    assert_spoken(two.join([one, two, one]), part.join([text, part, text]))
    assert_spoken(str(one), text)
    assert_spoken(copy.deepcopy(one), text)
    assert_spoken(pickle.loads(pickle.dumps(one)), text)
    assert "".join(piece.text for piece in one.pieces) == text


@given(texts)
def test_letters_keep_their_marks_in_another_case(text):
    for name in ("upper", "lower", "title", "capitalize"):
        result = getattr(spoken(text), name)()
        assert (result, result.marks) == (getattr(text, name)(), spoken(text).marks)
    assert Spoken("ß", A).upper() == "SS" and marks_of(Spoken("ß", A).upper()) == A * 2
    assert marks_of(Spoken("ßA", A + B).upper()) == mark("unknown") * 3


def test_what_forgets_is_untrusted():
    one = spoken("A")
    for text in (f"{one}!", re.sub("A", "y", one), "".join([one, one]), f"{one:>9}", one.center(9)):
        assert marks_of(text) == mark("unknown") * len(text)
    joined = "plain" + spoken("A")
    assert [(p.text, p.speaker, p.trusted) for p in joined.pieces] == [
        ("plain", "unknown", False),
        ("A", "template", True),
    ]


def test_marks_of_values():
    value = speak({"k": ["v", 1, None]}, A)
    assert common_mark(value) == common_mark(value, 3, "") == A
    assert common_mark(value, spoken("A")) == common_mark() == mark("unknown")
    assert quoted_mark({spoken("A"): value}) == A
    assert quoted_mark(spoken("A")) == B
    assert quoted_mark([value, Spoken("x", mark("tool"))]) == mark("unknown")


def test_as_many_marks_as_characters():
    with pytest.raises(ValueError, match="2 marks for 3 characters"):
        Spoken("abc", A * 2)
