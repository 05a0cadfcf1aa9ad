"""The server's routes, and what stands before them: keys, sizes, and headers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import importlib.metadata
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer.server import chats, completions, responses
from infer.server.choices import finished
from infer.server.errors import ApiError, as_api_error, handle_errors
from infer.server.metrics import Metrics
from infer.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ErrorResponse,
    ResponsesRequest,
    TokenizeRequest,
)
from infer.server.served import Served, chat_prompt, check_length

log = logging.getLogger("qwen_jax")

# What answers without a key.
OPEN = {"/", "/health", "/ping", "/version", "/metrics", "/load"}
# Bytes of a body too large that are still read, so that its sender hears why.
DROPPED = 64 * 2**20
_ERRORS: dict[int | str, Any] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 422, 429, 500, 503, 504)
}


def create_app(served: Served, *, api_keys: Sequence[str] = (), origins: Sequence[str] = ()) -> FastAPI:
    """The application. api_keys: of which a request has to show one; origins: whose pages may ask (CORS)."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for engine in served.engines.values():
            await asyncio.to_thread(engine.stop)

    # `docs_url`'s page would load scripts from elsewhere
    options: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": "/openapi.json"}
    app = FastAPI(title="qwen-jax", version=_version(), lifespan=lifespan, responses=_ERRORS, **options)
    handle_errors(app)
    app.add_middleware(Guard, api_keys=tuple(api_keys), max_body=served.limits.max_body)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    metrics = Metrics(served.engines)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await chats.chat(served, metrics, body, request)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await completions.complete(served, metrics, body, request)

    @app.post("/v1/responses")
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        return await responses.respond(served, metrics, body, request)

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        return await _embed(served, metrics, body, request)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(served, name) for name in served.engines]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> Any:
        served.engine(model)
        return _model(served, model)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        qwen = served.engine(body.model).engine.qwen
        text = body.prompt if body.prompt is not None else body.content
        if text is not None:
            tokens = await served.beside(qwen.tokenizer.encode, text)
        else:
            options = {"add_generation_prompt": body.add_generation_prompt}
            tokens = await served.beside(chat_prompt, qwen, body.messages, **options)
        found = {"count": len(tokens), "max_model_len": served.engine(body.model).engine.capacity, "tokens": tokens}
        if body.return_token_strs:
            found["token_strs"] = [qwen.tokenizer.decode([id]) for id in tokens]
        return found

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Any:
        text = served.engine(body.model).engine.qwen.tokenizer.decode(body.tokens)
        return {"prompt": text, "content": text}

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Any:
        if any(engine.failure for engine in served.engines.values()):
            raise ApiError(503, "an engine has failed; start the server again.", type="server_error")
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> Any:
        return {"version": _version()}

    @app.get("/load")
    async def load() -> Any:
        return {"server_load": sum(engine.num_unfinished for engine in served.engines.values())}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        headers = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'"}
        return HTMLResponse((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), headers=headers)

    return app


def _version() -> str:
    return importlib.metadata.version("qwen-jax")


def _model(served: Served, name: str) -> dict[str, Any]:
    found = {"id": name, "object": "model", "created": served.created, "owned_by": "qwen-jax"}
    return found | {"max_model_len": served.engine(name).engine.capacity}


async def _embed(served: Served, metrics: Metrics, body: EmbeddingRequest, request: Request) -> Response:
    """Final hidden states of the last tokens, of length 1; `dimensions` keeps the first (Matryoshka)."""
    engine = served.engine(body.model)
    qwen = engine.engine.qwen
    if body.dimensions is not None and body.dimensions > qwen.config.hidden_size:
        raise ApiError(400, f"dimensions may be at most {qwen.config.hidden_size}.", param="dimensions")
    texts = body.input
    inputs = [texts] if isinstance(texts, str) or (texts and isinstance(texts[0], int)) else list(texts)
    if not 1 <= len(inputs) <= served.limits.max_choices:
        raise ApiError(400, f"input may have 1 to {served.limits.max_choices} texts.", param="input")

    def prepare() -> list[Any]:
        made = [
            engine.engine.request(text, qwen.sampling(temperature=0.0), answers=False, max_tokens=1) for text in inputs
        ]
        for asked in made:
            check_length(engine, asked.asked.prompt)
        return made

    handles = engine.enqueue(await served.beside(prepare))
    await finished(request, handles, served.limits.timeout, metrics, lambda index, piece: None)
    data = []
    for index, handle in enumerate(handles):
        assert handle.request.hidden is not None
        hidden = handle.request.hidden[: body.dimensions]
        hidden = hidden / max(float(np.linalg.norm(hidden)), 1e-12)
        encoded: Any = hidden.tolist()
        if body.encoding_format == "base64":
            encoded = base64.b64encode(hidden.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": encoded})
    count = sum(len(handle.request.asked.prompt) for handle in handles)
    used = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": used})


class Guard:
    """Asks for a key, bounds bodies, names requests and logs them, without what they say."""

    def __init__(self, app: ASGIApp, *, api_keys: tuple[str, ...], max_body: int) -> None:
        self._app, self._keys, self._max_body = app, [key.encode() for key in api_keys], max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        name = headers.get(b"x-request-id", b"")[:128]
        id = (
            name
            if name.isascii() and name.decode(errors="replace").isprintable() and name
            else secrets.token_hex(8).encode()
        )
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                taken = str(int((time.perf_counter() - began) * 1e3)).encode()
                message["headers"] = [*message["headers"], (b"x-request-id", id), (b"openai-processing-ms", taken)]
            await send(message)

        try:
            if self._keys and scope["path"] not in OPEN and scope["method"] != "OPTIONS" and not self._knows(headers):
                told = {"WWW-Authenticate": "Bearer"}
                said = "the API key is missing or not known; send it as `Authorization: Bearer KEY`."
                raise ApiError(401, said, type="authentication_error", code="invalid_api_key", headers=told)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, answer)
        else:
            first = True

            async def again() -> Message:
                nonlocal first
                if first:
                    first = False
                    return {"type": "http.request", "body": body, "more_body": False}
                return await receive()

            try:
                await self._app(scope, again, answer)
            except Exception as error:
                log.exception("%s %s failed", scope["method"], scope["path"])
                if status:  # the client has the beginning of an answer: it learns by the connection's end
                    raise
                await as_api_error(error).response()(scope, receive, answer)
        log.debug("%s %s %d %.3f s", scope["method"], scope["path"], status, time.perf_counter() - began)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        shown = [bearer.strip()] if scheme.lower() == b"bearer" else []
        shown.append(headers.get(b"x-api-key", b""))
        # all of them, so that time tells nothing
        return any([hmac.compare_digest(key, given) for key in self._keys for given in shown])

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body."""
        body, size = b"", 0
        declared = headers.get(b"content-length", b"0")
        is_too_large = declared.isdigit() and int(declared) > self._max_body
        while True:
            message = await receive()
            is_last = message["type"] == "http.disconnect" or not message.get("more_body")
            size += len(message.get("body", b""))
            is_too_large |= size > self._max_body
            body = b"" if is_too_large else body + message.get("body", b"")
            if is_too_large and (is_last or size > DROPPED):
                raise ApiError(413, f"the body is larger than the {self._max_body} bytes that are read here.")
            if is_last:
                return body
