"""Messages in OpenAI's form: checked before a template sees them, and read out of what a model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.spoken import Speaker

# OpenAI's roles; "function" is its older name for a tool's result
SPEAKERS: dict[str, Speaker] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")

# --- Messages -> a template's messages --------------------------------------------------------------------------------


def check_message(index: int, message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """The message as `template` expects it, in `transformers`' way: nothing is null, content is a string.

    Roles that the template does not know become those they mean. Arguments of tool calls are an object for a template
    that writes them as JSON. Raises InputError naming the message and what is wrong with it.
    """
    if not isinstance(message, Mapping) or "role" not in message:
        raise InputError(f"message {index} must be an object with role and content, got {_brief(message)}.")
    role = message["role"]
    if not isinstance(role, str) or role not in SPEAKERS:
        raise InputError(f"message {index} has the unknown role {_brief(role)}; known: {', '.join(SPEAKERS)}.")
    checked = {key: value for key, value in message.items() if value is not None}
    content, calls = checked.get("content"), checked.get("tool_calls")
    reasoning = next((checked[name] for name in _REASONING if name in checked), None)
    if content is None:
        if not calls and reasoning is None:
            raise InputError(f"message {index} ({role}) has no content; give a string or a list of text parts.")
        # older templates ask whether there is a content; to the others an empty one says the same
        checked["content"] = None if re.search(r"content['\"\]]*\s+is\s+(not\s+)?none", template) else ""
    elif isinstance(content, list):
        checked["content"] = "\n".join(_text_part(index, part) for part in content)
    elif not isinstance(content, str):
        raise InputError(f"message {index} has content of type {type(content).__name__}; give a string or text parts.")
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise InputError(f"message {index} has reasoning of type {type(reasoning).__name__}; give a string.")
        checked |= {"reasoning_content": reasoning}
    if calls is not None:
        if not isinstance(calls, list | tuple):
            raise InputError(f"message {index} has tool_calls of type {type(calls).__name__}; give a list.")
        checked["tool_calls"] = [_check_call(index, call, template) for call in calls]
    if not re.search(rf"""['"]{role}['"]""", template):
        checked["role"] = SPEAKERS[role]
    return checked


def _text_part(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(
        f"message {index} has a content part of type {_brief(kind)}; only {{'type': 'text', 'text': ...}} is read."
    )


def _check_call(index: int, call: Any, template: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"message {index} has a tool call without a function name: {_brief(call)}.")
    given = arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise InputError(f"message {index}: the arguments of {_brief(function['name'])} are not a JSON object.")
    # OpenAI sends JSON text, which a template that only writes JSON would quote a second time
    writes_json = re.search(r"arguments\s*\|\s*tojson", template) and not re.search(
        r"arguments\s+is\s+string", template
    )
    return {**call, "function": {**function, "arguments": arguments if writes_json else given}}


def _brief(value: Any) -> str:
    """A value as an error may show it; a hostile one is nested too deeply to be shown, or long."""
    try:
        shown = repr(value)
    except RecursionError:
        shown = type(value).__name__
    return shown if len(shown) <= 200 else shown[:200] + "..."


# --- Text -> messages -------------------------------------------------------------------------------------------------

_CALL, _END = re.compile(r"<tool_call>\s*(?=\{)"), re.compile(r"\s*</tool_call>")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """(content, [{"name", "arguments"}]) of an assistant's turn in Qwen2.5's and Qwen3's `<tool_call>` form.

    A block that is unfinished or not such a JSON object stays in the content.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    calls: list[dict[str, Any]] = []
    content, position = "", 0
    for begin in _CALL.finditer(text):
        if begin.start() < position:  # inside an argument of the call before
            continue
        try:
            call, end = decoder.raw_decode(text, begin.end())
        except (ValueError, RecursionError):
            continue
        close = _END.match(text, end)
        if close and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict):
            calls.append({"name": call["name"], "arguments": call["arguments"]})
            content, position = content + text[position : begin.start()], close.end()
    content += text[position:]
    return (content.strip() if calls else text), calls
