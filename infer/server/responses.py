"""POST /v1/responses: the same answers as items. Nothing is stored, so that a conversation is sent whole each time."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from infer.server.chats import Talk, start
from infer.server.choices import finished, pieces, streamed, usage
from infer.server.errors import ApiError, as_api_error, event
from infer.server.metrics import Metrics
from infer.server.protocol import ChatRequest, ResponsesRequest
from infer.server.served import Served
from infer.server.turn import Delta
from qwen_jax.errors import InputError


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request to the chat route. Raises ApiError for what needs stored answers, or cannot be one."""
    if body.previous_response_id is not None:
        raise ApiError(
            404,
            "answers are not stored here, so that previous_response_id finds none; send the conversation as input.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if body.background:
        raise ApiError(400, "background is not possible: answers are not stored here.", param="background")
    told: dict[str, Any] = {"model": body.model, "messages": _messages(body)}
    names = ("temperature", "top_p", "seed", "parallel_tool_calls")
    told |= {name: value for name in names if (value := getattr(body, name)) is not None}
    told["max_completion_tokens"] = body.max_output_tokens
    # tools of a hosted service are left out: clients name them whether they need them or not
    tools = [tool for tool in body.tools or [] if tool.get("type") == "function"]
    if tools:
        told["tools"] = [{"type": "function", "function": tool} for tool in tools]
        choice = body.tool_choice
        told["tool_choice"] = (
            {"type": "function", "function": {"name": choice.get("name")}}
            if isinstance(choice, dict) and choice.get("type") == "function"
            else choice
            if choice in ("none", "auto", "required")
            else None
        )
    if body.text and body.text.format:
        form = body.text.format.model_dump(by_alias=True, exclude_none=True)
        if form["type"] == "json_schema":
            form = {"type": "json_schema", "json_schema": {"name": "answer"} | form}
        told["response_format"] = form
    if body.reasoning:
        told["reasoning_effort"] = body.reasoning.effort
    try:
        return ChatRequest.model_validate(told)
    except ValidationError as error:
        raise as_api_error(error) from error


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _text(i, item.get("content"))})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else _text(i, output) if output else ""
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        elif kind != "reasoning":
            raise InputError(f"input {i} is of type {kind!r}; messages, function calls and their outputs are read.")
    return messages


def _text(index: int, content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InputError(f"input {index} has a part that is no text.")
        texts.append({"type": "text", "text": part["text"]})
    return texts


class Items:
    """The output items of one answer, and the events that announce them, from its deltas."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: str | None = None  # the kind of delta that the last item takes

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        events = []
        kind = "arguments" if delta.kind == "call" else delta.kind
        if delta.kind == "call" or kind != self._open:
            events += self.close()
            events += self._begin(kind, delta)
        if delta.kind == "call":
            return events
        item, index = self.items[-1], len(self.items) - 1
        where = {"item_id": item["id"], "output_index": index}
        if kind == "arguments":
            item["arguments"] += delta.text
            return [*events, {"type": "response.function_call_arguments.delta", **where, "delta": delta.text}]
        item["content"][0]["text"] += delta.text
        name = "response.output_text.delta" if kind == "content" else "response.reasoning_text.delta"
        told = {"type": name, **where, "content_index": 0, "delta": delta.text}
        return [*events, told | ({"logprobs": []} if kind == "content" else {})]

    def _begin(self, kind: str, delta: Delta) -> list[dict[str, Any]]:
        item: dict[str, Any]
        if kind == "arguments":
            item = {
                "type": "function_call",
                "id": f"fc_{secrets.token_hex(12)}",
                "call_id": f"call_{secrets.token_hex(12)}",
            }
            item |= {"name": delta.text, "arguments": "", "status": "in_progress"}
        elif kind == "reasoning":
            item = {"type": "reasoning", "id": f"rs_{secrets.token_hex(12)}", "summary": []}
            item |= {"content": [{"type": "reasoning_text", "text": ""}], "status": "in_progress"}
        else:
            item = {"type": "message", "id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
            item |= {"content": [{"type": "output_text", "text": "", "annotations": []}], "status": "in_progress"}
        self.items.append(item)
        self._open = kind
        index = len(self.items) - 1
        shown = {**item, "content": []} if kind == "content" else _copy(item)
        events = [{"type": "response.output_item.added", "output_index": index, "item": shown}]
        if kind == "content":
            where = {"item_id": item["id"], "output_index": index, "content_index": 0}
            events.append({"type": "response.content_part.added", **where, "part": _copy(item["content"][0])})
        return events

    def close(self, status: str = "completed") -> list[dict[str, Any]]:
        """Ends the item that is open, if any."""
        if self._open is None:
            return []
        item, index, kind = self.items[-1], len(self.items) - 1, self._open
        item["status"], self._open = status, None
        where = {"item_id": item["id"], "output_index": index}
        done = {"type": "response.output_item.done", "output_index": index, "item": _copy(item)}
        if kind == "arguments":
            told = {"type": "response.function_call_arguments.done", **where, "name": item["name"]}
            return [told | {"arguments": item["arguments"]}, done]
        where["content_index"] = 0
        text = item["content"][0]["text"]
        if kind == "reasoning":
            return [{"type": "response.reasoning_text.done", **where, "text": text}, done]
        return [
            {"type": "response.output_text.done", **where, "text": text, "logprobs": []},
            {"type": "response.content_part.done", **where, "part": _copy(item["content"][0])},
            done,
        ]


def _copy(item: Any) -> Any:
    return json.loads(json.dumps(item))


def _response(
    body: ResponsesRequest, id: str, created: float, items: Sequence[Any], talk: Talk | None
) -> dict[str, Any]:
    """The response object; of one that goes on without `talk`."""
    status, details, used = "in_progress", None, None
    if talk:
        is_cut = talk.handle.request.answer.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        details = {"reason": "max_output_tokens"} if is_cut else None
        counted = usage([talk.handle], 1, talk.handle.engine.engine.qwen.tokenizer)
        used = {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": counted["completion_tokens_details"],
            "total_tokens": counted["total_tokens"],
        }
    form = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": details,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": list(items),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": body.temperature,
        "text": {"format": form or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool for tool in body.tools or [] if tool.get("type") == "function"],
        "top_p": body.top_p,
        "usage": used,
    }


async def respond(served: Served, metrics: Metrics, body: ResponsesRequest, request: Request) -> Response:
    _, (talk,) = await start(served, as_chat(body))
    id, created = f"resp_{secrets.token_hex(12)}", float(int(time.time()))
    if body.stream:
        return streamed(_stream(served, metrics, body, talk, id, created))
    items = Items()

    def take(index: int, piece: Any) -> None:
        for delta in talk.deltas(piece):
            items.add(delta)

    await finished(request, [talk.handle], served.limits.timeout, metrics, take)
    items.close("incomplete" if talk.finish_reason == "length" else "completed")
    return JSONResponse(_response(body, id, created, items.items, talk))


async def _stream(
    served: Served, metrics: Metrics, body: ResponsesRequest, talk: Talk, id: str, created: float
) -> AsyncGenerator[str]:
    items, number = Items(), 0

    def told(found: dict[str, Any]) -> str:
        nonlocal number
        text = event(found | {"sequence_number": number}, found["type"])
        number += 1
        return text

    for name in ("created", "in_progress"):
        yield told({"type": f"response.{name}", "response": _response(body, id, created, [], None)})
    try:
        async for _, piece in pieces([talk.handle], served.limits.timeout, metrics):
            for delta in talk.deltas(piece):
                for found in items.add(delta):
                    yield told(found)
    except Exception as error:
        failed = _response(body, id, created, items.items, None) | {"status": "failed"}
        failed["error"] = {"code": "server_error", "message": as_api_error(error).body["error"]["message"]}
        yield told({"type": "response.failed", "response": failed})
        return
    for found in items.close("incomplete" if talk.finish_reason == "length" else "completed"):
        yield told(found)
    whole = _response(body, id, created, items.items, talk)
    yield told({"type": f"response.{whole['status']}", "response": whole})
