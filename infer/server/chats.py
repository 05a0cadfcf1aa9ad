"""POST /v1/chat/completions."""

from __future__ import annotations

import copy
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from infer.engine import Handle, Piece, RunningEngine
from infer.engine import Request as Asked
from infer.server.choices import chat_logprobs, finished, pieces, streamed, usage
from infer.server.errors import event
from infer.server.metrics import Metrics
from infer.server.protocol import ChatRequest
from infer.server.served import Served, chat_prompt, forced_calls, grammar_of
from infer.server.turn import Delta, Turn
from qwen_jax.errors import InputError


@dataclasses.dataclass
class Talk:
    """One answer to a conversation, as it comes."""

    handle: Handle
    turn: Turn
    is_named: bool
    """Whether the client named the tool to call, for which OpenAI's finish_reason is "stop"."""

    def deltas(self, piece: Piece) -> list[Delta]:
        return self.turn.add(piece.text) + (self.turn.end() if piece.is_over else [])

    @property
    def finish_reason(self) -> str | None:
        reason = self.handle.request.answer.finish_reason
        return "tool_calls" if reason == "stop" and self.turn.num_calls and not self.is_named else reason


async def start(served: Served, body: ChatRequest) -> tuple[RunningEngine, list[Talk]]:
    """Renders a conversation and queues its answers. Raises InputError, ApiError, Full."""
    engine = served.engine(body.model)
    qwen = engine.engine.qwen

    def prepare() -> tuple[list[Asked], Turn]:
        thinks = "<think>" in qwen.tokenizer.special_tokens
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        if body.tool_choice == "none":
            tools = []
        calls = forced_calls(qwen, body)
        form = grammar_of(qwen, body.response_format, body.structured_outputs)
        if form and calls:
            raise InputError("an answer cannot be both a tool call and of a form of its own; leave out one of them.")
        options = _template_options(body)
        if thinks and (form or calls):
            options.setdefault("enable_thinking", False)
        prompt = chat_prompt(
            qwen,
            body.messages,
            tools or None,
            continues=body.continue_final_message,
            add_generation_prompt=body.add_generation_prompt,
            **options,
        )
        opened = qwen.tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>")
        turn = Turn(
            thinks=thinks and options.get("enable_thinking") is not False,
            is_thinking=opened and not (form or calls),
            has_tools=bool(tools),
        )
        made = served.requests(
            engine,
            [prompt],
            body,
            body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
            top_logprobs=max(body.top_logprobs or 0, body.prompt_logprobs or 0),
            prompt_logprobs=body.prompt_logprobs is not None,
            grammar=calls or form,
            stop_ids=qwen.turns.stop_ids,
        )
        return made, turn

    made, turn = await served.beside(prepare)
    named = isinstance(body.tool_choice, dict)
    return engine, [Talk(handle, copy.copy(turn), named) for handle in engine.enqueue(made)]


def _template_options(body: ChatRequest) -> dict[str, Any]:
    """Of the template's variables, those that a request may set."""
    given = body.chat_template_kwargs or {}
    if unknown := set(given) - {"enable_thinking", "documents"}:
        raise InputError(f"chat_template_kwargs may have enable_thinking and documents, not {sorted(unknown)[0]!r}.")
    if body.reasoning_effort is not None:
        given = {"enable_thinking": body.reasoning_effort != "none"} | given
    return dict(given)


async def chat(served: Served, metrics: Metrics, body: ChatRequest, request: Request) -> Response:
    engine, talks = await start(served, body)
    tokenizer = engine.engine.qwen.tokenizer
    handles = [talk.handle for talk in talks]
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    if body.stream:
        return streamed(_stream(served, metrics, body, talks, head | {"object": "chat.completion.chunk"}))
    told: list[list[Delta]] = [[] for _ in talks]
    await finished(
        request,
        handles,
        served.limits.timeout,
        metrics,
        lambda index, piece: told[index].extend(talks[index].deltas(piece)),
    )
    choices = []
    for index, (talk, deltas) in enumerate(zip(talks, told, strict=True)):
        logprobs = None
        if body.logprobs:
            logprobs = chat_logprobs(tokenizer, talk.handle, 0, len(talk.handle.request.answer.tokens))
        choices.append(
            {"index": index, "message": message(deltas), "logprobs": logprobs, "finish_reason": talk.finish_reason}
        )
    answer = head | {"object": "chat.completion", "choices": choices, "usage": usage(handles, len(handles), tokenizer)}
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = _prompt_logprobs(handles[0], body.prompt_logprobs)
    return JSONResponse(answer)


def message(deltas: Sequence[Delta]) -> dict[str, Any]:
    """An assistant's message of all its deltas."""
    content = "".join(delta.text for delta in deltas if delta.kind == "content")
    reasoning = "".join(delta.text for delta in deltas if delta.kind == "reasoning")
    found: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:  # under both names that clients read
        found |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if calls := called(deltas):
        found["tool_calls"] = calls
        found["content"] = content or None
    return found


def called(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.kind == "call":
            function = {"name": delta.text, "arguments": ""}
            calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        elif delta.kind == "arguments":
            calls[delta.index]["function"]["arguments"] += delta.text
    return calls


async def _stream(
    served: Served, metrics: Metrics, body: ChatRequest, talks: list[Talk], head: Mapping[str, Any]
) -> AsyncGenerator[str]:
    handles = [talk.handle for talk in talks]
    tokenizer = handles[0].engine.engine.qwen.tokenizer
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

    def chunk(index: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**head, "choices": [choice]} | ({"usage": None} if with_usage else {}))

    for index in range(len(talks)):
        yield chunk(index, {"role": "assistant", "content": ""})
    told = [0] * len(talks)
    async for index, piece in pieces(handles, served.limits.timeout, metrics):
        talk = talks[index]
        found = [_as_delta(delta) for delta in talk.deltas(piece)]
        logprobs = None
        if body.logprobs and piece.num_tokens > told[index]:
            logprobs = chat_logprobs(tokenizer, talk.handle, told[index], piece.num_tokens)
            told[index] = piece.num_tokens
            found = found or [{"content": ""}]
        for i, delta in enumerate(found):
            yield chunk(index, delta, None, logprobs if i == 0 else None)
        if piece.is_over:
            yield chunk(index, {}, talk.finish_reason)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(handles, len(handles), tokenizer)})
    yield event("[DONE]")


def _as_delta(delta: Delta) -> dict[str, Any]:
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text, "reasoning": delta.text}
    if delta.kind == "call":
        function = {"name": delta.text, "arguments": ""}
        begun = {"index": delta.index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        return {"tool_calls": [begun]}
    return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}


def _prompt_logprobs(handle: Handle, num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's form: for each token but the first, ids to what they are and their log-probability."""
    request, tokenizer = handle.request, handle.engine.engine.qwen.tokenizer
    rows: list[dict[str, Any] | None] = [None]
    for id, (logprob, top) in zip(request.asked.prompt[1:], request.prompt_logprobs, strict=True):
        values = dict(top[:num_top]) | {id: logprob}
        rows.append({str(i): {"logprob": value, "decoded_token": tokenizer.decode([i])} for i, value in values.items()})
    return rows
