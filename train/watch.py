"""Signals that ask a run to stop, and a thread that sees when it does nothing any more."""

from __future__ import annotations

import os
import select
import signal
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from qwen_jax.errors import EnvironmentFailed

# A phase is long after so many times its usual time, and never before so many seconds.
_LONG, _NEVER_BEFORE = 10.0, 60.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAVING = "checkpoint"
"""The phase that a stop waits for, however long it takes: it has timeouts of its own."""


class Watch:
    """Knows what the run does, for how long, and whether it has been asked to stop; use it in `with`.

    SIGTERM is what a scheduler sends before it takes a machine away. The first SIGTERM or Ctrl-C sets `requested`, and
    the loop stops after a step. Where the main thread waits for a device or another process it runs no Python, and its
    handlers neither: after a signal, a run that ends no phase within `grace` seconds is ended here, with a sentence and
    the status of a failed environment. A second Ctrl-C interrupts at once.
    """

    def __init__(self, grace: float, say: Callable[[str], None]) -> None:
        self.requested: signal.Signals | None = None
        self._grace, self._say = grace, say
        self._phase, self._kind, self._since = "starting", "starting", time.monotonic()
        self._times: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=100))
        self._read, self._write = socket.socketpair()
        self._ended = False

    def enter(self, kind: str, detail: Any = "") -> None:
        """The run begins something else: "step", "evaluation", ..."""
        now = time.monotonic()
        self._times[self._kind].append(now - self._since)
        self._phase, self._kind, self._since = f"{kind} {detail}".strip(), kind, now

    def __enter__(self) -> Watch:
        # Python lets only the main thread handle signals
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            self._write.setblocking(False)
            self._fd_before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._handles:
            signal.set_wakeup_fd(self._fd_before)
            for number, before in self._before.items():
                signal.signal(number, before)
        self._write.close()
        self._thread.join()
        self._read.close()

    def _handle(self, number: int, _: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number)

    def _run(self) -> None:
        asked_at: float | None = None
        said, said_since = 0.0, 0.0  # how long the phase that began then had gone on when it was last spoken of
        while not self._ended:
            if select.select([self._read], [], [], 1.0)[0]:
                numbers = self._read.recv(64)
                if any(number in _SIGNALS for number in numbers):
                    asked_at = time.monotonic()
            phase, since, now = self._phase, self._since, time.monotonic()
            if since != said_since:
                said, said_since = 0.0, since
            if asked_at and self._kind != SAVING and now - max(asked_at, since) > self._grace:
                self._end(f"asked to stop, but {phase} has not ended within {self._grace:g} s")
            usual = statistics.median(self._times[self._kind]) if self._times[self._kind] else None
            limit = max(_NEVER_BEFORE, _LONG * usual, 2 * said) if usual is not None else None
            if limit is not None and now - since > limit:
                said = now - since
                self._say(f"{phase} goes on for {said:.0f} s; usually it takes {usual:.1f} s")

    def _end(self, reason: str) -> None:
        print(
            f"qwen-jax: {reason}; the process ends, and the same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EnvironmentFailed.status)
