"""What a server serves: a model and its adapters, each with a running engine, and how requests reach them."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infer import grammar
from infer.engine import Request, RunningEngine
from infer.grammar import Grammar
from infer.qwen import Qwen
from infer.sampling import Sampling
from infer.server.errors import ApiError
from infer.server.protocol import ChatRequest, ResponseFormat, Sampled, StructuredOutputs
from qwen_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take."""

    max_waiting: int = 64
    """Requests that wait for a row; more are refused (429)."""
    timeout: float = 600.0
    """Seconds until an answer has to be there."""
    max_body: int = 4 * 2**20
    """Bytes of a request."""
    max_choices: int = 32
    """Answers to one request: prompts times n."""


@dataclasses.dataclass
class Served:
    """The model under its name and its adapters under theirs."""

    engines: dict[str, RunningEngine]
    limits: Limits = dataclasses.field(default_factory=Limits)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # renders, tokenises and compiles grammars beside the event loop, two at a time
        self._beside = asyncio.Semaphore(2)

    def engine(self, model: str | None) -> RunningEngine:
        """Raises ApiError for a name that is not served."""
        if model is None:
            return next(iter(self.engines.values()))
        if model not in self.engines:
            known = ", ".join(self.engines)
            raise ApiError(
                404, f"the model {model!r} is not served here; there is {known}.", param="model", code="model_not_found"
            )
        return self.engines[model]

    async def beside(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs what takes a while in a thread."""
        async with self._beside:
            return await asyncio.to_thread(functools.partial(function, *args, **kwargs))

    def requests(
        self,
        engine: RunningEngine,
        prompts: Sequence[list[int]],
        body: Sampled,
        max_tokens: int | None,
        stop_ids: Sequence[int] = (),
        **kwargs: Any,
    ) -> list[Request]:
        """n requests for each prompt, in order; an answer is cut to what the prompt leaves room for."""
        count = body.n or 1
        if len(prompts) * count > self.limits.max_choices:
            raise ApiError(
                400,
                f"at most {self.limits.max_choices} answers to one request are possible, prompts times n.",
                param="n",
            )
        qwen = engine.engine.qwen
        seed = secrets.randbits(32) if body.seed is None else body.seed
        made = []
        for prompt in prompts:
            room = check_length(engine, prompt)
            limit = min(room, room if max_tokens is None else max_tokens)
            for index in range(count):
                sampling = sampling_of(qwen, body, (seed + index) % 2**32, max(limit, 1))
                if kwargs.get("grammar"):  # an answer that has its form is over
                    sampling = dataclasses.replace(sampling, min_tokens=0)
                made.append(
                    engine.engine.request(
                        prompt,
                        sampling,
                        max_tokens=max(limit, 1),
                        answers=limit > 0,
                        stop=body.stop or (),
                        stop_ids=(*stop_ids, *(body.stop_token_ids or ())),
                        **kwargs,
                    )
                )
        return made


def check_length(engine: RunningEngine, prompt: Sequence[int]) -> int:
    """Tokens that an answer may have. Raises ApiError for a prompt that leaves none."""
    capacity = engine.engine.capacity
    if len(prompt) >= capacity:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens, and the model reads at most {capacity} with the answer; shorten it.",
            param="messages",
            code="context_length_exceeded",
        )
    return capacity - len(prompt)


def sampling_of(qwen: Qwen, body: Sampled, seed: int, limit: int) -> Sampling:
    """Raises InputError for ids beyond the vocabulary."""
    bias = {}
    for text, value in (body.logit_bias or {}).items():
        if not text.isdecimal() or int(text) >= len(qwen.tokenizer):
            raise ApiError(400, f"logit_bias: {text!r} is no id of the vocabulary.", param="logit_bias")
        bias[int(text)] = value
    allowed = tuple(body.allowed_token_ids or ())
    if allowed and not 0 <= min(allowed) <= max(allowed) < len(qwen.tokenizer):
        raise ApiError(400, "allowed_token_ids: one is no id of the vocabulary.", param="allowed_token_ids")
    return qwen.sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=None if body.top_k is None else max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=seed,
        min_tokens=limit if body.ignore_eos else body.min_tokens,
        logit_bias=tuple(bias.items()) or None,
        allowed_tokens=allowed or None,
    )


# --- conversations ----------------------------------------------------------------------------------------------------


def chat_prompt(
    qwen: Qwen,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    continues: bool = False,
    add_generation_prompt: bool = True,
    **template_kwargs: Any,
) -> list[int]:
    """Token ids of a conversation in OpenAI's form, `continues` inside its last message. Raises InputError."""
    told = [_as_rendered(message) for message in messages]
    if not continues:
        return qwen.chat_prompt(told, tools=tools, add_generation_prompt=add_generation_prompt, **template_kwargs)
    last = told.pop()
    if last.get("role") != "assistant" or not told:
        raise InputError("continue_final_message needs a last message of the assistant, after others.")
    begun = qwen.chat_prompt(told, tools=tools, **template_kwargs)
    return begun + qwen.tokenizer.encode(str(last.get("content") or ""), allow_special=False)


def _as_rendered(message: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in message.items() if value is not None}
    role = told.get("role")
    told["role"] = {"developer": "system", "function": "tool"}.get(role, role) if isinstance(role, str) else role
    if "content" not in told and (role == "assistant" or "tool_calls" in told):
        told["content"] = ""
    if "reasoning" in told:
        told.setdefault("reasoning_content", told["reasoning"])
    return told


@functools.lru_cache(maxsize=64)
def _compiled(qwen: Qwen, source: str) -> Grammar:
    return Grammar(qwen.tokenizer, qwen.turns.stop_ids, source)


def grammar_of(qwen: Qwen, form: ResponseFormat | None, structured: StructuredOutputs | None) -> Grammar | None:
    """What an answer has to look like, if it has to. Raises InputError for what cannot be compiled."""
    sources = []
    if form and form.type == "json_object":
        sources.append(grammar.json_schema(form.schema_ or {"type": "object"}))
    if form and form.type == "json_schema" and form.json_schema:
        sources.append(grammar.json_schema(True if form.json_schema.schema_ is None else form.json_schema.schema_))
    if structured:
        if structured.json_ is not None:
            sources.append(grammar.json_schema(_parsed(structured.json_)))
        if structured.regex is not None:
            sources.append(grammar.regex(structured.regex))
        if structured.choice is not None:
            sources.append(grammar.choice(structured.choice))
        if structured.grammar is not None:
            sources.append(grammar.lark(structured.grammar))
    if len(sources) > 1:
        raise InputError("an answer can have one form only; leave out all but one of them.")
    return _compiled(qwen, sources[0]) if sources else None


def _parsed(schema: Any) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema is no JSON: {error}.") from error


def forced_calls(qwen: Qwen, body: ChatRequest) -> Grammar | None:
    """The grammar of calls that tool_choice asks for. Raises ApiError for a tool that is not among the tools."""
    choice, tools = body.tool_choice, [tool.function.model_dump() for tool in body.tools or []]
    if not tools or choice in (None, "auto", "none"):
        return None
    parallel = body.parallel_tool_calls is not False
    if isinstance(choice, dict):
        name = (choice.get("function") or choice).get("name")
        tools = [tool for tool in tools if tool["name"] == name]
        if not tools:
            raise ApiError(400, f"tool_choice: {name!r} is none of the tools.", param="tool_choice")
        parallel = False
    return _compiled(qwen, grammar.tool_calls(qwen.tokenizer, tools, parallel=parallel))
