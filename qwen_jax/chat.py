"""Conversations -> prompts: by the checkpoint's own jinja template, or by the generation's published default."""

from __future__ import annotations

import bisect
import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qwen_jax import templates
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.messages import SPEAKERS, check_message, parse_tool_calls
from qwen_jax.spoken import Speaker, Spoken, mark
from qwen_jax.tokenizer import GENERATIONS, IM_END, IM_START, Generation, Tokenizer

__all__ = [
    "default_template",
    "encode_conversation",
    "generation_of",
    "parse_tool_calls",
    "render",
    "stop_ids",
    "turns",
]

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


# --- Where turns end --------------------------------------------------------------------------------------------------


class Turns(NamedTuple):
    """Whether a checkpoint chats, and the ids that end an assistant's turn."""

    is_chat: bool
    stop_ids: tuple[int, ...]


def turns(
    tokenizer: Tokenizer,
    generation: Generation,
    template: str | Mapping[str, str],
    declared_ids: Sequence[int] = (),
    chat_format: str | None = None,
) -> Turns:
    """How a checkpoint chats: it does if it says so, or if what ends its texts also ends a turn of its template.

    declared_ids: what generation_config.json says ends a text. chat_format: Qwen1's, from there too.
    """
    declared = (*declared_ids, *tokenizer.eos_ids)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ends: list[int] = []
    with contextlib.suppress(InputError):  # a template that refuses these messages tells nothing
        text = render(said, template=template, add_generation_prompt=False, special_tokens=tokenizer.named_tokens)
        after = text.marks.rfind(mark("assistant")) + 1
        ends = [id for id in tokenizer.encode(text[after:]) if id in tokenizer.special_ids][:1]
    marks = {*ends, tokenizer.special_tokens.get(IM_END)}
    is_chat = chat_format == "chatml" or (chat_format != "raw" and not marks.isdisjoint(declared))
    if generation == "qwen1" and ends:  # as QwenLM's own code does
        ends.append(tokenizer.special_tokens[IM_START])
    return Turns(is_chat, tuple(dict.fromkeys([*ends, *declared])))


def stop_ids(tokenizer: Tokenizer, generation: Generation) -> tuple[int, ...]:
    """The ids that end an assistant's turn in the generation's own template."""
    if IM_END not in tokenizer.special_tokens:
        raise InputError(f"the tokenizer has no {IM_END}, which ends a chat turn; use a chat model's tokenizer.")
    return turns(tokenizer, generation, default_template(generation)).stop_ids


# --- Messages -> text -------------------------------------------------------------------------------------------------


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    trusted_roles: Collection[str] = (),
    **template_kwargs: Any,
) -> Spoken:
    """The prompt of a conversation, as `transformers` renders it; its `pieces` say who spoke.

    A control token spelled out in it is one to `Tokenizer.encode` only where the template wrote it. Templates are
    untrusted programs: they run with limits on time and memory.

    messages: {"role", "content"} in OpenAI's form; content is a string or a list of text parts (joined by newlines),
        and an assistant may have "tool_calls" and "reasoning_content".
    template: jinja source, or several by name: "tool_use" is taken when there are tools, otherwise "default".
    tools: OpenAI tool objects.
    special_tokens: eos_token and the like, for the template (`Tokenizer.named_tokens`).
    trusted_roles: roles whose text may hold control tokens.
    template_kwargs: further variables of the template, such as enable_thinking or documents.
    Raises InputError on messages or a template that cannot be rendered.
    """
    source = _choose(template, tools)
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages must be a list of objects with role and content, got {type(messages).__name__}.")
    if not messages:
        raise InputError("there are no messages; give at least one, such as {'role': 'user', 'content': 'Hello'}.")
    if unknown := set(trusted_roles) - set(SPEAKERS):
        raise InputError(f"trusted_roles has the unknown role {unknown.pop()!r}; known: {', '.join(SPEAKERS)}.")
    for tool in tools or []:
        if not isinstance(tool, Mapping):
            raise InputError(f"a tool must be an object with type and function, got {type(tool).__name__}.")
    spoken: list[tuple[Mapping[str, Any], Speaker, bool]] = [
        (check_message(i, message, source), SPEAKERS[message["role"]], message["role"] in trusted_roles)
        for i, message in enumerate(messages)
    ]
    tools = None if tools is None else list(tools)
    variables = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    own = {name: text for name, text in (special_tokens or {}).items() if name not in template_kwargs}
    return templates.render(source, spoken, variables | template_kwargs, own)


def _choose(template: str | Mapping[str, str], tools: Any) -> str:
    if isinstance(template, str):
        return template
    name = "tool_use" if tools is not None and "tool_use" in template else "default"
    if name not in template:
        raise InputError(f"of the chat templates {', '.join(sorted(template))} none is the default; choose one.")
    return template[name]


def encode_conversation(
    tokenizer: Tokenizer, stop_ids: Collection[int], messages: Sequence[Mapping[str, Any]], **options: Any
) -> tuple[list[int], list[bool]]:
    """Ids of a whole conversation, and for each whether the assistant said it: what fine-tuning learns.

    A template that has `{% generation %}` says that itself. Otherwise an assistant's turn reaches from where the
    template asks for an answer to the id that ends it, one of `stop_ids`. options: as for `render`.
    """
    options = {"special_tokens": tokenizer.named_tokens} | options
    text = render(messages, add_generation_prompt=False, **options)
    ids, spans = tokenizer.encode_spoken(text)
    learned = [piece.generated for piece in text.pieces for _ in piece.text]
    if not any(learned):
        asked = str.__str__(render(messages, add_generation_prompt=True, **options))
        header = asked.removeprefix(text) if asked.startswith(text) else ""
        ends = [end for id, (_, end) in zip(ids, spans, strict=True) if id in stop_ids]
        for start, end in _turns_of_the_assistant(text, header, ends):
            learned[start:end] = [True] * (end - start)
    return ids, [any(learned[start:end]) for start, end in spans]


def _turns_of_the_assistant(text: Spoken, header: str, ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where the assistant's turns lie in a rendered conversation: from behind `header` up to one of `ends`."""
    speakers = [piece.speaker for piece in text.pieces for _ in piece.text]
    others = [i for i, speaker in enumerate(speakers) if speaker in ("system", "user", "tool")]
    end = 0
    while "assistant" in speakers[end:]:
        first = speakers.index("assistant", end)
        before = bisect.bisect_left(others, first)
        begin = max(end, others[before - 1] + 1 if before else 0)
        next_other = others[before] if before < len(others) else len(text)
        # of a header only the beginning may stand in the history, such as a thinking model's without <think>
        sizes = range(len(header), len(header) // 2, -1)
        found = ((at + size) for size in sizes if (at := text.rfind(header[:size], begin, first)) >= 0)
        start = next(found, first)
        last = max(i for i in range(first, next_other) if speakers[i] == "assistant") + 1
        end = next((end for end in ends if first < end <= next_other), last)
        yield start, end
