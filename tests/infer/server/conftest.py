"""A live server over a tiny model of random weights, for OpenAI's own client and for plain requests."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import jax
import pytest
import uvicorn

from infer.engine import Engine, RunningEngine
from infer.qwen import Qwen
from infer.server.app import create_app
from infer.server.served import Limits, Served
from qwen_jax.model import init
from tests.infer import tiny


@dataclasses.dataclass
class Live:
    url: str
    qwen: Qwen
    served: Served

    @property
    def running(self) -> RunningEngine:
        return self.served.engine("tiny")

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON (or text); `body` may be bytes as they are sent."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        return self._read(request)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], Any]:
        return self._read(urllib.request.Request(self.url + path, None, headers))

    def _read(self, request: urllib.request.Request) -> tuple[int, dict[str, str], Any]:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, found, text = answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                status, found, text = error.code, error.headers, error.read().decode()
        headers = {name.lower(): value for name, value in found.items()}
        try:
            return status, headers, json.loads(text)
        except ValueError:
            return status, headers, text

    def settle(self) -> None:
        """Waits until nobody asks any more."""
        deadline = time.monotonic() + 60
        while self.running.num_unfinished:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextlib.contextmanager
def serving(qwen: Qwen, limits: Limits | None = None, **options: Any) -> Iterator[Live]:
    engine = Engine(qwen, rows=4, page=16, piece=32, steps=4)
    running = RunningEngine(engine, max_waiting=(limits or Limits()).max_waiting)
    served = Served({"tiny": running}, limits or Limits())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(create_app(served, **options), port=port, log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Live(f"http://127.0.0.1:{port}", qwen, served)
    finally:
        server.should_exit = True
        thread.join()
    engine.pool.check()


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    config = dataclasses.replace(tiny.CONFIG, max_position_embeddings=2048)
    qwen = Qwen(config, init(config, jax.random.key(0)), tiny.tokenizer())
    with serving(qwen) as live:
        yield live
