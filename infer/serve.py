"""`qwen-jax serve`: OpenAI's API over an engine, and a page to talk to it."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from infer.arguments import ModelArguments
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from infer.qwen import Qwen


@dataclasses.dataclass(frozen=True)
class Arguments(ModelArguments):
    """Serves a model to OpenAI's clients, on this machine alone unless --host says otherwise.

    Each --adapter is a model of its own name beside it, over the same weights. Keys that clients have to show are read
    from a file or the environment, since other users of a machine can read its command lines.
    """

    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 is every network, which wants a key."""
    port: int = 8000
    name: str | None = None
    """The model's name for clients; default the last part of --model."""
    api_key_file: Path | None = None
    """A file with one key a line; without it, those of the environment variable QWEN_JAX_API_KEYS, apart by spaces."""
    origins: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A web page's origin, such as https://example.org, whose scripts may ask; may be repeated. By default none."""
    rows: int = 16
    """Requests that are answered at the same time."""
    cache_tokens: int | None = None
    """Tokens of all requests together whose keys and values are kept; default what memory leaves, see what is said."""
    max_waiting: int = 64
    """Requests that may wait for a row; more are refused, to be sent again later."""
    timeout: float = 600.0
    """Seconds after which an answer is given up."""
    drain: int = 30
    """Seconds that running requests have when the server is told to stop."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Arguments, args=list(argv), prog="qwen-jax serve")
    try:
        import uvicorn

        from infer.server.app import create_app
        from infer.server.served import Limits, Served
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; serving needs it: pip install 'qwen-jax[serve]'.") from error
    if not 0 <= options.port < 2**16:
        raise InputError(f"--port {options.port} is not possible; it must be between 0 and 65535.")
    keys = _keys(options.api_key_file)

    from rich.console import Console
    from rich.progress import track

    from infer.engine import Engine, RunningEngine

    logging.getLogger("qwen_jax").setLevel(logging.INFO)
    each = options.load_each()
    base = options.name or Path(options.model).name or "default"
    num_pages = None if options.cache_tokens is None else 1 + -(-options.cache_tokens // 128)
    engines = {}
    for adapter, qwen in each:
        pages = num_pages or _pages(qwen, options.rows, len(each))
        engine = Engine(qwen, rows=options.rows, num_pages=pages, cache_dtype=options.cache_dtype)
        _say(f"{adapter or base}: {engine.described()}")
        programs = engine.programs()
        for program in track(programs[:2], "compiling", console=Console(stderr=True), disable=not sys.stderr.isatty()):
            program()
        engines[adapter or base] = RunningEngine(engine, max_waiting=options.max_waiting, when_idle=programs[2:])
    served = Served(engines, Limits(max_waiting=options.max_waiting, timeout=options.timeout))
    app = create_app(served, api_keys=keys, origins=options.origins)
    if not keys and options.host not in ("127.0.0.1", "localhost", "::1"):
        _say("no API key is set: whoever reaches this address may ask.")
    _say(f"http://{options.host}:{options.port} is ready: /v1 for clients, / for people, /metrics for Prometheus")
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_graceful_shutdown=options.drain,
        server_header=False,
    )
    return 0


def _keys(file: Path | None) -> list[str]:
    if file is None:
        return os.environ.get("QWEN_JAX_API_KEYS", "").split()
    try:
        keys = file.read_text().split()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; it should hold one key a line.") from error
    if not keys:
        raise InputError(f"{file} holds no key; write one a line.")
    return keys


def _pages(qwen: Qwen, rows: int, engines: int) -> int:
    """Pages for `rows` whole contexts, as far as the device's memory goes; on a host, for 4,096 tokens each, or one
    whole context, as far as a quarter of what is free goes."""
    import jax

    from qwen_jax.paged_cache import page_bytes

    page = page_bytes(qwen.config, 128, qwen.backend.cache_dtype or qwen.params["embed"]["embedding"].dtype)
    stats = jax.local_devices()[0].memory_stats() or {}
    context = qwen.config.context_length
    if "bytes_limit" in stats:
        tokens, free = rows * context, 0.85 * (stats["bytes_limit"] - stats["bytes_in_use"])
    else:
        tokens, free = max(context, rows * 4096), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    return 1 + max(1, min(-(-tokens // 128), int(free / engines // page)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
