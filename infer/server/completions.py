"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from infer.engine import Handle, RunningEngine
from infer.server.choices import LEAST, finished, pieces, shown, streamed, usage
from infer.server.errors import event
from infer.server.metrics import Metrics
from infer.server.protocol import CompletionRequest
from infer.server.served import Served, grammar_of
from qwen_jax.errors import InputError


async def complete(served: Served, metrics: Metrics, body: CompletionRequest, request: Request) -> Response:
    engine = served.engine(body.model)
    qwen = engine.engine.qwen

    def prepare() -> list[Any]:
        prompts = [_ids(engine, prompt, body.suffix) for prompt in _prompts(body)]
        options = {
            "top_logprobs": body.logprobs or 0,
            "prompt_logprobs": bool(body.echo) and body.logprobs is not None,
            "grammar": grammar_of(qwen, body.response_format, body.structured_outputs),
        }
        return served.requests(engine, prompts, body, body.max_tokens, **options)

    handles = engine.enqueue(await served.beside(prepare))
    n = body.n or 1
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
    head |= {"model": body.model}

    def echoed(handle: Handle) -> str:
        return qwen.tokenizer.decode(handle.request.asked.prompt) if body.echo else ""

    def choice(index: int, text: str, begin: int, end: int, reason: str | None) -> dict[str, Any]:
        logprobs = None
        if body.logprobs is not None:
            logprobs = _logprobs(handles[index], begin, end, with_prompt=bool(body.echo) and begin == 0)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    if body.stream:
        return streamed(_stream(body, handles, head, choice, echoed, served, metrics))
    await finished(request, handles, served.limits.timeout, metrics, lambda index, piece: None)
    choices = []
    for index, handle in enumerate(handles):
        answer = handle.request.answer
        text = echoed(handle) + answer.text
        choices.append(choice(index, text, 0, len(answer.tokens), answer.finish_reason))
    return JSONResponse(head | {"choices": choices, "usage": usage(handles, n, qwen.tokenizer)})


async def _stream(
    body: CompletionRequest,
    handles: list[Handle],
    head: Any,
    choice: Any,
    echoed: Any,
    served: Served,
    metrics: Metrics,
) -> AsyncGenerator[str]:
    tokenizer = handles[0].engine.engine.qwen.tokenizer
    told = [0] * len(handles)
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    extra = {"usage": None} if with_usage else {}
    begun = [False] * len(handles)

    async for index, piece in pieces(handles, served.limits.timeout, metrics):
        handle = handles[index]
        text, reason = piece.text, handle.request.answer.finish_reason if piece.is_over else None
        if not begun[index]:
            text, begun[index] = echoed(handle) + text, True
        yield event(head | {"choices": [choice(index, text, told[index], piece.num_tokens, reason)]} | extra)
        told[index] = piece.num_tokens
    if with_usage:
        yield event(head | {"choices": [], "usage": usage(handles, body.n or 1, tokenizer)})
    yield event("[DONE]")


def _prompts(body: CompletionRequest) -> list[Any]:
    """Each a text or ids."""
    prompt = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _ids(engine: RunningEngine, prompt: str | list[int], suffix: str | None) -> list[int]:
    """With a suffix, in the form of Qwen-Coder's fill-in-the-middle. Raises InputError for a model that has none."""
    tokenizer = engine.engine.qwen.tokenizer
    if not suffix:
        # of OpenAI's default prompt the control token is meant
        return tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    try:
        begin, end, middle = (tokenizer.special_tokens[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle"))
    except KeyError:
        raise InputError("suffix needs a model that fills in the middle, such as Qwen2.5-Coder.") from None
    before = tokenizer.encode(prompt, allow_special=False) if isinstance(prompt, str) else list(prompt)
    return [begin, *before, end, *tokenizer.encode(suffix, allow_special=False), middle]


def _logprobs(handle: Handle, begin: int, end: int, *, with_prompt: bool) -> dict[str, Any]:
    """The form of completions: lists beside each other. An echoed first token has no log-probability."""
    request = handle.request
    tokenizer, answer = handle.engine.engine.qwen.tokenizer, request.answer
    rows: list[tuple[int, float | None, list[tuple[int, float]] | None]] = []
    if with_prompt:
        rows.append((request.asked.prompt[0], None, None))
        told = zip(request.asked.prompt[1:], request.prompt_logprobs, strict=True)
        rows += [(id, token.logprob, token.top) for id, token in told]
    for i in range(begin, end):
        rows.append((answer.tokens[i], answer.logprobs[i], answer.top_logprobs[i] if request.num_top else []))
    texts = [shown(tokenizer, id) for id, _, _ in rows]
    offset = sum(len(shown(tokenizer, id)) for id in answer.tokens[:begin])
    if begin and request.wants_prompt_logprobs:
        offset += sum(len(shown(tokenizer, id)) for id in request.asked.prompt)
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if logprob is None else max(logprob, LEAST) for _, logprob, _ in rows],
        "top_logprobs": [
            None if top is None else {shown(tokenizer, id): max(value, LEAST) for id, value in [*top, (id_, value_)]}
            for id_, value_, top in rows
        ]
        if request.num_top
        else None,
        "text_offset": offsets,
    }
