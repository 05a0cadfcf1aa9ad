"""From the pieces of running requests to what the routes of completions and chats have in common."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from infer.engine import Handle, Piece, Stopped
from infer.server.errors import ApiError, as_api_error, event
from infer.server.metrics import Metrics
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer

# What stands for a log-probability of minus infinity, which is no JSON.
LEAST = -9999.0
# Seconds after which a stream without news sends a comment, so that proxies keep it open.
PING = 15.0


async def pieces(handles: Sequence[Handle], timeout: float, metrics: Metrics) -> AsyncIterator[tuple[int, Piece]]:
    """(index, piece) of all as they come. Whoever stops listening cancels them. Raises what ended one, TimeoutError."""
    news: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    async def listen(index: int, handle: Handle) -> None:
        try:
            async for piece in handle:
                news.put_nowait((index, piece))
        except Stopped as error:
            news.put_nowait(error)
        except InputError as error:  # of the model, not of what was asked
            news.put_nowait(ApiError(500, str(error), type="server_error"))

    tasks = [asyncio.create_task(listen(i, handle)) for i, handle in enumerate(handles)]
    watches = [metrics.watch(handle) for handle in handles]
    unfinished = len(handles)
    try:
        async with asyncio.timeout(timeout):
            while unfinished:
                found = await news.get()
                if isinstance(found, BaseException):
                    raise found
                index, piece = found
                watches[index](piece)
                unfinished -= piece.is_over and handles[index].request.error is None
                yield found
    finally:
        for handle, task in zip(handles, tasks, strict=True):
            handle.cancel()
            task.cancel()


async def finished(
    request: Request, handles: Sequence[Handle], timeout: float, metrics: Metrics, each: Callable[[int, Piece], None]
) -> None:
    """Waits until all are over, or the client has left, which cancels them. `each` is told every piece."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def read() -> None:
        async for index, piece in pieces(handles, timeout, metrics):
            each(index, piece)

    reading, leaving = asyncio.create_task(read()), asyncio.create_task(gone())
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ApiError(499, "the client has left.")
        await reading
    finally:
        for task in (reading, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def streamed(events: AsyncGenerator[str]) -> StreamingResponse:
    """Server-sent events; what goes wrong after the first is told as one, and comments keep a slow stream alive."""

    async def guarded() -> AsyncIterator[str]:
        coming: asyncio.Future[str] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(events))
                done, _ = await asyncio.wait({coming}, timeout=PING)
                if not done:
                    yield ": ping\n\n"
                    continue
                result, coming = coming, None
                try:
                    yield result.result()
                except StopAsyncIteration:
                    return
                except Exception as error:
                    yield event(as_api_error(error).body)
                    return
        finally:
            if coming:
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await coming
            await events.aclose()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream; charset=utf-8", headers=headers)


def usage(handles: Sequence[Handle], n: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Each prompt counts once."""
    prompt = sum(len(handle.request.asked.prompt) for handle in handles[::n])
    answer = sum(len(handle.request.answer.tokens) for handle in handles)
    end = tokenizer.special_tokens.get("</think>")
    reasoning = sum(
        tokens.index(end) + 1
        for handle in handles
        if end is not None and end in (tokens := handle.request.answer.tokens)
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(handle.request.cached for handle in handles[::n])},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def shown(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.token_bytes(id).decode(errors="replace")


def chat_logprobs(tokenizer: Tokenizer, handle: Handle, begin: int, end: int) -> dict[str, Any]:
    """OpenAI's form for tokens `begin` to `end` of a chat's answer."""
    answer, num_top = handle.request.answer, handle.request.num_top

    def entry(id: int, logprob: float) -> dict[str, Any]:
        told = {"token": shown(tokenizer, id), "logprob": max(logprob, LEAST)}
        return told | {"bytes": list(tokenizer.token_bytes(id))}

    content = []
    for i in range(begin, end):
        top = answer.top_logprobs[i] if num_top else []
        content.append(
            entry(answer.tokens[i], answer.logprobs[i]) | {"top_logprobs": [entry(id, logprob) for id, logprob in top]}
        )
    return {"content": content, "refusal": None}
