"""`qwen-jax generate --input FILE --output FILE`: many prompts through an engine, going on where it stopped."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.engine import Engine, RunningEngine, Stopped
from infer.qwen import Qwen
from infer.sampling import Sampling
from qwen_jax.errors import EnvironmentFailed, InputError

if TYPE_CHECKING:
    from infer.server.metrics import Metrics
    from infer.server.served import Served


@dataclasses.dataclass(frozen=True)
class Settings:
    """How lines that do not say it themselves are answered."""

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    system: str | None
    raw: bool


def run(qwen: Qwen, source: Path, out: Path, settings: Settings, *, rows: int = 16) -> int:
    """Answers every line of `source`, in its order, into `out`; returns how many could not be.

    A line is {"prompt": text} or {"messages": [...]}, which comes back with its answer, or one of OpenAI's batches
    ({"custom_id", "url", "body"}), which comes back as OpenAI's. Lines that `out` has already are not answered again.
    Raises InputError for a file that cannot be read, or whose lines are no JSON objects, and EnvironmentFailed where
    answers cannot be written.
    """
    lines = list(_lines(source))
    done = _answered(out, len(lines))
    return asyncio.run(_run(qwen, lines, out, done, settings, rows))


def _lines(source: Path) -> Iterator[dict[str, Any]]:
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read: {error}; it should hold one JSON object a line.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}, line {number}, is no JSON: {error}.") from error
        if not isinstance(record, dict) or not {"prompt", "messages", "body"} & record.keys():
            raise InputError(f"{source}, line {number}, has neither prompt, messages nor body.")
        yield record


def _answered(out: Path, most: int) -> int:
    """Whole lines that a run before left; what it was writing when it was ended is cut off."""
    if not out.exists():
        return 0
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(out, len(whole))
    if (count := whole.count(b"\n")) > most:
        raise InputError(f"{out} has {count} answers, more than there are lines; give another --output.")
    return count


async def _run(qwen: Qwen, lines: list[dict[str, Any]], out: Path, done: int, settings: Settings, rows: int) -> int:
    from rich.console import Console
    from rich.progress import track

    running = RunningEngine(Engine(qwen, rows=rows))
    answer = _Answers(qwen, running, settings)
    failed = 0
    try:
        with out.open("a", encoding="utf-8") as file:
            answers = _in_order(lines[done:], answer, 2 * rows)
            bar = track(
                range(len(lines) - done), "answering", console=Console(stderr=True), disable=not sys.stderr.isatty()
            )
            for _ in bar:
                found = await anext(answers)
                failed += bool(found.get("error"))
                file.write(json.dumps(found, ensure_ascii=False) + "\n")
                file.flush()
    except OSError as error:
        raise EnvironmentFailed(
            f"{out} cannot be written ({error.strerror}); free some space, and the same command goes on from there."
        ) from error
    finally:
        await asyncio.to_thread(running.stop)
    return failed


async def _in_order(
    lines: list[dict[str, Any]], answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]], most: int
) -> AsyncIterator[dict[str, Any]]:
    """The answers in the order of their lines, `most` of them under way."""
    tasks: list[asyncio.Future[dict[str, Any]]] = []
    try:
        for i in range(len(lines)):
            while len(tasks) < min(len(lines), i + most):
                tasks.append(asyncio.ensure_future(answer(lines[len(tasks)])))
            yield await tasks[i]
    finally:
        for task in tasks:
            task.cancel()


class _Answers:
    """What answers one line."""

    def __init__(self, qwen: Qwen, running: RunningEngine, settings: Settings) -> None:
        self._qwen, self._running, self._settings = qwen, running, settings

    async def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        return await (self._openai(record) if "body" in record else self._plain(record))

    async def _plain(self, record: dict[str, Any]) -> dict[str, Any]:
        qwen, settings = self._qwen, self._settings
        try:
            handle = self._running.submit(
                _prompt(qwen, record, settings),
                settings.sampling,
                max_tokens=settings.max_tokens,
                stop=settings.stop,
                stop_ids=qwen.turns.stop_ids if qwen.is_chat_model and not settings.raw else (),
            )
            async for _ in handle:
                pass
        except Stopped:  # no fault of this line
            raise
        except InputError as error:
            return record | {"answer": None, "error": str(error)}
        found = handle.request.answer
        counts = {"prompt_tokens": found.prompt_tokens, "answer_tokens": len(found.tokens)}
        return record | {"answer": found.text, "finish_reason": found.finish_reason, **counts}

    @functools.cached_property
    def _routes(self) -> tuple[Served, Metrics, dict[str, tuple[Any, Any]]]:
        """The server's own, by their paths. Raises InputError where what a server needs is not installed."""
        try:
            from infer.server import chats, completions
            from infer.server.metrics import Metrics
            from infer.server.protocol import ChatRequest, CompletionRequest
            from infer.server.served import Limits, Served
        except ImportError as error:
            raise InputError(f"lines of OpenAI's batches need {error.name}: pip install 'qwen-jax[serve]'.") from error
        engines = {"model": self._running}
        routes = {
            "/v1/chat/completions": (ChatRequest, chats.chat),
            "/v1/completions": (CompletionRequest, completions.complete),
        }
        return Served(engines, Limits(timeout=float("inf"))), Metrics(engines), routes

    async def _openai(self, record: dict[str, Any]) -> dict[str, Any]:
        served, metrics, routes = self._routes
        from infer.server.errors import ApiError, as_api_error

        try:
            kind, route = routes.get(record.get("url", "/v1/chat/completions"), (None, None))
            if kind is None or not isinstance(record["body"], dict):
                raise ApiError(404, f"a batch may ask {' and '.join(routes)}, with an object as body.")
            body = kind.model_validate(record["body"] | {"model": "model", "stream": False})
            response = await route(served, metrics, body, _Nobody())
            status, told = response.status_code, json.loads(response.body)
        except Stopped:
            raise
        except Exception as error:
            refused = as_api_error(error)
            status, told = refused.status, refused.body
        return {
            "id": f"batch_req_{record.get('custom_id')}",
            "custom_id": record.get("custom_id"),
            "response": {"status_code": status, "request_id": "", "body": told},
            "error": told.get("error"),
        }


class _Nobody:
    """A client that never hangs up."""

    async def receive(self) -> dict[str, Any]:
        return await asyncio.Future()


def _prompt(qwen: Qwen, record: dict[str, Any], settings: Settings) -> list[int]:
    before = [{"role": "system", "content": settings.system}] if settings.system else []
    if "messages" in record:
        return qwen.chat_prompt(record["messages"])
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be text, got {type(prompt).__name__}.")
    if qwen.is_chat_model and not settings.raw:
        return qwen.chat_prompt([*before, {"role": "user", "content": prompt}])
    return qwen.tokenizer.encode(prompt)
