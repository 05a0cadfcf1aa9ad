"""Messages <-> text: ChatML from the checkpoint's own jinja template, or from the generation's published default."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import GENERATIONS, IM_END, IM_START, Generation, Tokenizer

ROLES = ("system", "user", "assistant", "tool")

# --- The published defaults -------------------------------------------------------------------------------------------

_DEFAULT_SYSTEM: dict[Generation, str | None] = {
    "qwen1": "You are a helpful assistant.",
    "qwen1.5": "You are a helpful assistant",
    "qwen2": "You are a helpful assistant.",
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2.5-math": r"Please reason step by step, and put your final answer within \boxed{}.",
    "qwq": "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. "
    "You should think step-by-step.",
    "qwen3": None,
}

# All generations write the same ChatML, tools as in Qwen2.5. Only Qwen3 (`thinks`) treats reasoning apart: it is kept
# in the turns after the last real query, that is, after the last user turn that is not a lone tool response.
_TEMPLATE = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else default_system %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if system is not none %}{{- system + '\n\n' }}{%- endif %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments' }}
    {{- ' within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif system is not none %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
{%- set query = namespace(last=messages | length - 1) %}
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == 'user' and not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
        {%- set query.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- set content = message.content %}
        {%- if thinks %}
            {%- set reasoning = message.reasoning_content %}
            {%- if reasoning is undefined or reasoning is none %}
                {%- set before = content.split('</think>')[:-1] %}
                {%- set reasoning = before[0].rstrip('\n').split('<think>')[-1].lstrip('\n') if before else '' %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') if before else content %}
            {%- endif %}
            {%- if loop.index0 > query.last and (loop.last or reasoning) %}
                {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
                {{- content.lstrip('\n') }}
            {%- else %}
                {{- content }}
            {%- endif %}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\n' }}{%- endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if thinks and enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""


def default_template(generation: Generation) -> str:
    """The generation's published chat template, as jinja source that stands alone (it can be saved in a checkpoint)."""
    if generation not in GENERATIONS:
        raise InputError(f"unknown generation {generation!r}; known: {', '.join(GENERATIONS)}.")
    system = _DEFAULT_SYSTEM[generation]
    literal = "none" if system is None else json.dumps(system)
    thinks = "true" if generation == "qwen3" else "false"
    return f"{{%- set default_system = {literal} %}}\n{{%- set thinks = {thinks} %}}" + _TEMPLATE


def generation_of(config: ModelConfig, tokenizer: Tokenizer) -> Generation:
    """The generation a checkpoint without a chat template belongs to (QwQ is not told from Qwen2.5: it has its own)."""
    if config.model_type == "qwen":
        return "qwen1"
    if config.model_type.startswith("qwen3"):
        return "qwen3"
    if "<tool_call>" in tokenizer.special_tokens:
        return "qwen2.5-math" if config.rope_theta == 10_000 else "qwen2.5"
    # One vocabulary for both: Qwen2 shares key/value heads; of Qwen1.5 only 32B and 110B do, and its MoE has 60 experts
    qwen15 = config.num_kv_heads == config.num_heads or config.intermediate_size in (27392, 49152)
    return "qwen1.5" if qwen15 else "qwen2"


def stop_ids(tokenizer: Tokenizer, generation: Generation) -> tuple[int, ...]:
    """The ids that end an assistant's turn."""
    marks = (IM_END, IM_START) if generation == "qwen1" else (IM_END,)
    if missing := [mark for mark in marks if mark not in tokenizer.special_tokens]:
        raise InputError(f"the tokenizer has no {missing[0]}, which ends a chat turn; use a chat model's tokenizer.")
    return tuple(dict.fromkeys([*(tokenizer.special_tokens[mark] for mark in marks), *tokenizer.eos_ids]))


# --- Messages -> text -------------------------------------------------------------------------------------------------


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **template_kwargs: Any,
) -> str:
    """The prompt of a conversation, as `transformers` renders it; templates are untrusted and run in jinja's sandbox.

    messages: {"role", "content"} in OpenAI's form; content is a string or a list of text parts (joined by newlines),
        and an assistant may have "tool_calls" and "reasoning_content".
    tools: OpenAI tool objects.
    template_kwargs: further variables of the template, such as enable_thinking.
    Raises InputError on messages or a template that cannot be rendered.
    """
    checked = [_check_message(i, message) for i, message in enumerate(messages)]
    if not checked:
        raise InputError("there are no messages; give at least one, such as {'role': 'user', 'content': 'Hello'}.")
    for tool in tools or []:
        if not isinstance(tool, Mapping):
            raise InputError(f"a tool must be an object with type and function, got {type(tool).__name__}.")
    compiled = _compile(template)
    try:
        return compiled.render(
            messages=checked, tools=tools or None, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise InputError(f"the chat template refused the messages: {error}") from None


def _check_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as templates expect it: content a string, arguments of calls parsed."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise InputError(f"message {index} must be an object with role and content, got {message!r}.")
    role = message["role"]
    if role not in ROLES:
        raise InputError(f"message {index} has the unknown role {role!r}; known: {', '.join(ROLES)}.")
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None:
        if not calls:
            raise InputError(f"message {index} ({role}) has no content; give a string or a list of text parts.")
        content = ""
    elif isinstance(content, list):
        content = "\n".join(_text_part(index, part) for part in content)
    elif not isinstance(content, str):
        raise InputError(f"message {index} has content of type {type(content).__name__}; give a string or text parts.")
    checked = {**message, "content": content}
    if calls:
        checked["tool_calls"] = [_check_call(index, call) for call in calls]
    return checked


def _text_part(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(
        f"message {index} has a content part of type {kind!r}; only {{'type': 'text', 'text': ...}} is read."
    )


def _check_call(index: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"message {index} has a tool call without a function name: {call!r}.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI sends JSON text; written as it is, a template would quote it twice
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise InputError(f"message {index}: the arguments of {function['name']!r} are not a JSON object.")
    return {**call, "function": {**function, "arguments": arguments}}


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote; it does not change the text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's own filter escapes HTML


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


@functools.cache
def _environment() -> jinja2.Environment:
    """Jinja set up as `transformers` sets it up, since checkpoints' templates are written for that."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid jinja (line {error.lineno}: {error.message}).") from None


# --- Text -> messages -------------------------------------------------------------------------------------------------

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """(content, [{"name", "arguments"}]) of an assistant's turn in Qwen2.5's and Qwen3's `<tool_call>` form.

    A block that is unfinished or not such a JSON object stays in the content.
    """
    calls: list[dict[str, Any]] = []

    def take(block: re.Match[str]) -> str:
        try:
            call = json.loads(block[1])
        except ValueError:
            return block[0]
        if not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
            return block[0]
        calls.append({"name": call["name"], "arguments": call["arguments"]})
        return ""

    content = _TOOL_CALL.sub(take, text)
    return (content.strip() if calls else text), calls
