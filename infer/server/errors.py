"""OpenAI's error object, for everything that goes wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from infer.engine import Full, Stopped
from qwen_jax.errors import InputError


class ApiError(Exception):
    """A refusal, with its HTTP status and OpenAI's names for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an exception; of one that nobody foresaw no more than that."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError | ValidationError):
        return _of_field(error.errors()[0])
    if isinstance(error, Full):
        return ApiError(429, str(error), type="rate_limit_error", headers={"Retry-After": "1"})
    if isinstance(error, Stopped):
        return ApiError(503, str(error), type="server_error")
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took longer than the server allows; ask for less.", type="timeout_error")
    return ApiError(500, "the server failed; its log says why.", type="server_error")


def _of_field(found: Mapping[str, Any]) -> ApiError:
    """What a client is told of the first field that is not as the protocol has it."""
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['ctx']['error']}.")
    names = [str(name) for name in found["loc"] if name != "body"]
    message = found["msg"].removeprefix("Value error, ")
    said = f"{'.'.join(names)}: {message}" if names else message
    return ApiError(400, f"{said}.", param=names[0] if names else None)


def handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return as_api_error(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        said = (
            f"there is no {request.method} {request.url.path} here."
            if error.status_code in (404, 405)
            else error.detail
        )
        return ApiError(error.status_code, said, type=kind).response()

    async def known(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, Full, InputError, TimeoutError):
        app.add_exception_handler(kind, known)


def event(data: Any, name: str | None = None) -> str:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
