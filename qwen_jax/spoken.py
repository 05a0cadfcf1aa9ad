"""Text that knows, character by character, who spoke it and whether it may hold control tokens.

A chat template is a program over strings: it splits, strips, joins and quotes what the messages say. `Spoken` is a
`str` that keeps its marks through these operations. Whatever loses them ends up with a plain `str`, which counts as
untrusted: forgetting is safe.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, SupportsIndex, get_args

Speaker = Literal["unknown", "template", "system", "user", "assistant", "tool", "caller"]
SPEAKERS: tuple[Speaker, ...] = get_args(Speaker)

_TRUSTED, _GENERATED, _BITS = 1, 2, 2
_UNKNOWN = "\0"  # untrusted, not generated
_AS_GENERATED = {mark: mark | _GENERATED for mark in range(len(SPEAKERS) << _BITS)}


class Piece(NamedTuple):
    """A stretch of a rendered prompt.

    speaker: the role of the message it comes from; "template" for what the template itself writes, "caller" for tools,
        documents and other variables, "unknown" where the template hid it.
    trusted: whether control tokens spelled out in it are control tokens.
    generated: whether the template marks it, by `{% generation %}`, as what the model shall learn to say.
    """

    text: str
    speaker: Speaker
    trusted: bool
    generated: bool


def mark(speaker: Speaker, *, trusted: bool = False) -> str:
    """The mark of a character."""
    return chr(SPEAKERS.index(speaker) << _BITS | (_TRUSTED if trusted else 0))


class Spoken(str):
    """A string and, in `marks`, one mark for each of its characters."""

    marks: str

    def __new__(cls, text: str, marks: str = _UNKNOWN) -> Spoken:
        """`marks`: one for each character, or a single one for all."""
        new = super().__new__(cls, text)
        new.marks = marks * len(new) if len(marks) == 1 else marks
        if len(new.marks) != len(new):
            raise ValueError(f"{len(new.marks)} marks for {len(new)} characters")
        return new

    def __getnewargs__(self) -> tuple[str, str]:
        return str.__str__(self)[:], self.marks

    @property
    def pieces(self) -> list[Piece]:
        """The string in stretches of one speaker each."""
        flags = ((text, ord(mark)) for text, mark in self.runs)
        return [Piece(text, SPEAKERS[f >> _BITS], bool(f & _TRUSTED), bool(f & _GENERATED)) for text, f in flags]

    @property
    def runs(self) -> list[tuple[str, str]]:
        """Stretches of one mark each, and their marks."""
        runs, end = [], 0
        for mark, group in itertools.groupby(self.marks):
            start, end = end, end + len(list(group))
            runs.append((str.__getitem__(self, slice(start, end)), mark))
        return runs

    def generated(self) -> Spoken:
        """The same text as what the model shall learn to say."""
        return Spoken(self, self.marks.translate(_AS_GENERATED))

    # --- the operations of `str` that templates use, with marks -------------------------------------------------------

    def __str__(self) -> Spoken:
        return self

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if spec else self

    def __add__(self, other: str) -> str:
        if not isinstance(other, str) or hasattr(other, "__html__"):  # jinja's Markup escapes what it is added to
            return NotImplemented
        return Spoken(str.__add__(self, other), self.marks + marks_of(other))

    def __radd__(self, other: str) -> Spoken:
        return Spoken(str.__add__(other, self), marks_of(other) + self.marks)

    def __mul__(self, count: SupportsIndex) -> Spoken:
        return Spoken(str.__mul__(self, count), self.marks * count)

    __rmul__ = __mul__  # pyright: ignore[reportAssignmentType]

    def __getitem__(self, key: SupportsIndex | slice) -> Spoken:
        return Spoken(str.__getitem__(self, key), self.marks[key])

    def __iter__(self) -> Iterator[Spoken]:
        return map(Spoken, str.__iter__(self), self.marks)

    def join(self, parts: Iterable[str]) -> Spoken:
        parts = list(parts)
        return Spoken(str.join(self, parts), self.marks.join(map(marks_of, parts)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Spoken:
        if old:
            return _spoken(new).join(self.split(old, count))
        slots = len(self) + 1 if count.__index__() < 0 else min(count.__index__(), len(self) + 1)
        ahead = [new] * slots + [""] * (len(self) + 1 - slots)
        return Spoken("", "").join(itertools.chain(*zip(ahead, [*self, ""], strict=True)))

    def lstrip(self, chars: str | None = None) -> Spoken:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> Spoken:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None) -> Spoken:
        return self.rstrip(chars).lstrip(chars)

    def removeprefix(self, prefix: str) -> Spoken:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Spoken:
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._cut(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._cut(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        kept = self._cut(str.splitlines(self, keepends=True), "")
        return kept if keepends else [line[: len(bare)] for line, bare in zip(kept, str.splitlines(self), strict=True)]

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, middle, after = self._cut(str.partition(self, sep), "")
        return before, middle, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, middle, after = self._cut(str.rpartition(self, sep), "")
        return before, middle, after

    def _cut(self, parts: Sequence[str], sep: str | None) -> list[str]:
        """`parts` with their marks; they follow each other in the text, `sep` (None: whitespace) between them."""
        cut, end = [], 0
        for part in parts:
            start = self.find(part, end) if sep is None else end
            end = start + len(part)
            cut.append(self[start:end])
            end += len(sep or "")
        return cut

    def _recased(self, text: str) -> str:
        """`text`, this string in other letters, of which a few become several."""
        return Spoken(text, self.marks if len(text) == len(self) else common_mark(self))

    def lower(self) -> str:
        return self._recased(str.lower(self))

    def upper(self) -> str:
        return self._recased(str.upper(self))

    def title(self) -> str:
        return self._recased(str.title(self))

    def capitalize(self) -> str:
        return self._recased(str.capitalize(self))


def marks_of(text: str) -> str:
    return text.marks if isinstance(text, Spoken) else _UNKNOWN * len(text)


def _spoken(text: str) -> Spoken:
    return text if isinstance(text, Spoken) else Spoken(text)


def speak(value: Any, mark: str) -> Any:
    """A JSON value with `mark` on each of its strings, keys included."""
    if isinstance(value, str):
        return Spoken(value, mark)
    if isinstance(value, dict):
        return {speak(key, mark): speak(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [speak(item, mark) for item in value]
    return value


def common_mark(*values: Any) -> str:
    """The one mark of all strings in values, else that of an unknown speaker."""
    found = _marks_in(values)
    return found.pop() if len(found) == 1 else _UNKNOWN


def quoted_mark(value: Any) -> str:
    """The mark of a JSON value written out: `common_mark`, but what the template adds does not count."""
    found = _marks_in(value)
    others = found - {mark("template", trusted=True)}
    return common_mark(*(Spoken(" ", mark) for mark in others or found))


def _marks_in(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(marks_of(value))
    if isinstance(value, Mapping):
        return _marks_in([*value, *value.values()])
    return set().union(*map(_marks_in, value)) if isinstance(value, list | tuple) else set()
