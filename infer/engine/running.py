"""An engine in a thread of its own: requests go in from any thread or event loop, and their tokens come out there."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from infer.engine.engine import Engine
from infer.engine.request import Request
from infer.sampling import Sampling
from qwen_jax.errors import InputError
from qwen_jax.model import Params

log = logging.getLogger("qwen_jax")


class Piece(NamedTuple):
    """What a step added to an answer: its text, and how many tokens the answer has now."""

    text: str
    num_tokens: int
    is_over: bool


class Handle:
    """One request: iterate over its pieces once, from a thread or, where it was submitted from one, an event loop."""

    def __init__(self, engine: RunningEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._loops_pieces: asyncio.Queue[Piece] = asyncio.Queue()
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    def cancel(self) -> None:
        """Ends the request; what has been read of its prompt stays for others to find."""
        self.request.cancelled = True

    def __iter__(self) -> Iterator[Piece]:
        """Raises what ended the request besides itself: InputError for logits that are not finite, or Stopped."""
        while True:
            piece = self._pieces.get()
            yield piece
            if piece.is_over:
                break
        self._raise()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises what ended the request besides itself: InputError for logits that are not finite, or Stopped."""
        while True:
            piece = await self._loops_pieces.get()
            yield piece
            if piece.is_over:
                break
        self._raise()

    def _raise(self) -> None:
        if self.request.error:
            raise self.request.error

    def put(self, piece: Piece) -> None:
        if self._loop is None:
            self._pieces.put(piece)
        else:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._loops_pieces.put_nowait, piece)


class RunningEngine:
    """Steps an engine as long as there is something to do. Only its thread touches the engine; others leave word."""

    def __init__(
        self, engine: Engine, *, max_waiting: int | None = None, when_idle: Sequence[Callable[[], Any]] = ()
    ) -> None:
        """max_waiting: requests that may wait for a row; more are refused with `Full`. when_idle: what to run, one at a
        time, while nobody asks, such as `Engine.programs`."""
        self.engine = engine
        self._when_idle = list(when_idle)
        self.failure: BaseException | None = None
        self._max_waiting = max_waiting
        self._handles: dict[Request, Handle] = {}
        self._new: list[Handle] = []
        self._lock = threading.Condition()
        self._stopped = False
        self._params: Params | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- from any thread ----------------------------------------------------------------------------------------------

    def submit(self, prompt: Any, sampling: Sampling | None = None, **kwargs: Any) -> Handle:
        """Queues a prompt, arguments as `Engine.request`. Raises InputError where it never fits, Full, and
        Stopped."""
        return self.enqueue([self.engine.request(prompt, sampling, **kwargs)])[0]

    def enqueue(self, requests: list[Request]) -> list[Handle]:
        """Queues all of these. Raises Full, and Stopped."""
        handles = [Handle(self, request) for request in requests]
        with self._lock:
            if self.failure or self._stopped:
                raise self._stopped_because()
            if (
                self._max_waiting is not None
                and len(requests) > self._max_waiting + self.engine.rows - self.num_unfinished
            ):
                raise Full(f"{self.num_unfinished} requests are being answered or wait; try again in a moment.")
            self._new += handles
            self._lock.notify()
        return handles

    @property
    def num_unfinished(self) -> int:
        return len(self._handles) + len(self._new)

    @property
    def num_waiting(self) -> int:
        return max(0, self.num_unfinished - self.engine.num_running)

    def replace_params(self, params: Params) -> None:
        """Goes on with other weights after the step that runs: see `Engine.replace_params`."""
        with self._lock:
            self._params = params
            self._lock.notify()
            self._lock.wait_for(lambda: self._params is None or self.failure or self._stopped)

    def stop(self) -> None:
        """Ends the thread; unfinished requests end where they are."""
        with self._lock:
            self._stopped = True
            self._lock.notify()
        self._thread.join()

    # --- in the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_word():
                if self._handles:
                    self._step()
                elif self._when_idle:
                    self._when_idle.pop(0)()
        except BaseException as error:
            log.exception("the engine failed")
            self.failure = error
        finally:
            with self._lock:
                self._stopped = True
                self._lock.notify_all()
                for handle in [*self._handles.values(), *self._new]:
                    handle.request.error = self._stopped_because()
                    handle.put(Piece("", len(handle.request.answer.tokens), is_over=True))
                self._handles, self._new = {}, []

    def _stopped_because(self) -> Stopped:
        return Stopped(f"the engine has stopped: {self.failure or 'it was told to'}.")

    def _take_word(self) -> bool:
        """Takes in what others want, waiting where there is nothing to do."""
        with self._lock:
            self._lock.wait_for(
                lambda: self._stopped or self._params is not None or self._new or self._handles or self._when_idle
            )
            for handle in self._new:
                self.engine.enqueue(handle.request)
                self._handles[handle.request] = handle
            self._new = []
            if self._params is not None:
                self.engine.replace_params(self._params)
                self._params = None
                self._lock.notify_all()
            return not self._stopped

    def _step(self) -> None:
        said: dict[Request, str] = {}
        for request, text in self.engine.step():
            said[request] = said.get(request, "") + text
        for request, handle in list(self._handles.items()):
            is_over = request.is_over
            if is_over:  # before anybody hears of it, who may ask again at once
                del self._handles[request]
            if request in said or is_over:
                handle.put(Piece(said.get(request, ""), len(request.answer.tokens), is_over))


class Stopped(InputError):
    """The engine runs no more."""


class Full(Exception):
    """There is no room for another request to wait."""
