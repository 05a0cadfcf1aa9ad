"""An assistant's turn as its text comes: reasoning, content and tool calls, told apart once for streams and wholes."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Literal

from qwen_jax.messages import parse_tool_calls

_THINK, _END_THINK, _CALL, _END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_TAIL = re.compile(r"\s*\}\s*</tool_call>")


@dataclasses.dataclass(frozen=True)
class Delta:
    """What comes next: text of a kind, or of a call its name (once), then its arguments in pieces."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0


class Turn:
    """Text in, deltas out. Concatenated, they are the same however the text was cut."""

    def __init__(self, *, thinks: bool = False, is_thinking: bool = False, has_tools: bool = False) -> None:
        """thinks: the turn may begin with <think>; is_thinking: the prompt has opened it already."""
        self._state = "reasoning" if is_thinking else "begin" if thinks else "content"
        self._has_tools = has_tools
        self._rest = ""
        self._is_first = True  # of what stands before its text, white space is dropped
        self._depth, self._in_string, self._escaped = 0, False, False
        self._gap = ""  # white space before what looks like a call
        self.num_calls = 0

    def add(self, text: str) -> list[Delta]:
        self._rest += text
        return self._run(is_last=False)

    def end(self) -> list[Delta]:
        """What is left when the answer is over."""
        return self._run(is_last=True)

    def _run(self, *, is_last: bool) -> list[Delta]:
        found: list[Delta] = []
        while getattr(self, f"_{self._state}")(is_last, found):
            pass
        return [delta for delta in found if delta.text or delta.kind == "call"]

    def _begin(self, is_last: bool, found: list[Delta]) -> bool:
        text = self._rest.lstrip()
        if text.startswith(_THINK):
            self._rest, self._state = text.removeprefix(_THINK), "reasoning"
            return True
        if not is_last and _THINK.startswith(text):
            return False
        self._state = "content"
        return True

    def _reasoning(self, is_last: bool, found: list[Delta]) -> bool:
        if self._is_first:
            self._rest = self._rest.lstrip("\n")
            self._is_first = not self._rest
        at = self._rest.find(_END_THINK)
        if at >= 0:
            found.append(Delta("reasoning", self._rest[:at].rstrip("\n")))
            self._rest, self._state, self._is_first = self._rest[at + len(_END_THINK) :], "after", True
            return True
        # new lines before the end are not part of it
        held = 0 if is_last else _held(self._rest, _END_THINK, "\n")
        self._say("reasoning", held, found)
        return False

    def _after(self, is_last: bool, found: list[Delta]) -> bool:
        self._rest = self._rest.lstrip("\n")
        if not self._rest and not is_last:
            return False
        self._state = "content"
        return True

    def _content(self, is_last: bool, found: list[Delta]) -> bool:
        at = self._rest.find(_CALL) if self._has_tools else -1
        if at >= 0:
            before = self._rest[:at].rstrip()
            found.append(Delta("content", before if self.num_calls == 0 else before.strip()))
            self._gap = self._rest[len(before) : at]
            self._rest, self._state = self._rest[at + len(_CALL) :], "call"
            return True
        held = 0 if is_last or not self._has_tools else _held(self._rest, _CALL, " \n")
        if self.num_calls and not self._rest.strip():  # between calls
            held = 0 if is_last else len(self._rest)
            self._rest = "" if is_last else self._rest
        self._say("content", held, found)
        return False

    def _call(self, is_last: bool, found: list[Delta]) -> bool:
        if head := _HEAD.match(self._rest):
            found.append(Delta("call", head[1], self.num_calls))
            self._rest, self._state = self._rest[head.end() :], "arguments"
            self._depth, self._in_string, self._escaped = 0, False, False
            return True
        at = self._rest.find(_END_CALL)
        if at < 0 and not is_last:
            return False
        whole = self._rest[: at + len(_END_CALL)] if at >= 0 else self._rest
        self._rest, self._state = self._rest[len(whole) :], "content"
        content, calls = parse_tool_calls(_CALL + whole)  # in another order
        for call in calls:
            found.append(Delta("call", call["name"], self.num_calls))
            found.append(Delta("arguments", json.dumps(call["arguments"], ensure_ascii=False), self.num_calls))
            self.num_calls += 1
        if not calls:
            found.append(Delta("content", self._gap + content))
        return bool(self._rest)

    def _arguments(self, is_last: bool, found: list[Delta]) -> bool:
        for i, char in enumerate(self._rest):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    found.append(Delta("arguments", self._rest[: i + 1], self.num_calls))
                    self._rest, self._state = self._rest[i + 1 :], "close"
                    self.num_calls += 1
                    return True
        self._say("arguments", 0, found)
        self.num_calls += is_last
        return False

    def _close(self, is_last: bool, found: list[Delta]) -> bool:
        if tail := _TAIL.match(self._rest):
            self._rest, self._state = self._rest[tail.end() :], "content"
            return True
        at = self._rest.find(_END_CALL)
        if at < 0 and not is_last:
            return False
        self._rest, self._state = self._rest[at + len(_END_CALL) :] if at >= 0 else "", "content"
        return True

    def _say(self, kind: Literal["reasoning", "content", "arguments"], held: int, found: list[Delta]) -> None:
        end = len(self._rest) - held
        found.append(Delta(kind, self._rest[:end], self.num_calls))
        self._rest = self._rest[end:]


def _held(text: str, mark: str, spaces: str) -> int:
    """How much of the end of a text may be the beginning of a mark, with white space before it."""
    size = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    before = text[: len(text) - size]
    return size + len(before) - len(before.rstrip(spaces))
