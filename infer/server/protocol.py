"""What clients may ask: OpenAI's requests, and what vLLM's clients add, with ranges and defaults.

Fields that only a hosted service knows (store, metadata, user, service_tier ...) are taken and ignored, as all unknown
ones are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False)


class Sampled(Body):
    """How tokens are chosen; what is left out comes from the checkpoint's generation_config.json."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=1e6)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    n: int | None = Field(None, ge=1, le=128)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=300)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool = False
    allowed_token_ids: list[int] | None = Field(None, min_length=1, max_length=4096)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _checked(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only possible with stream: true")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or "" in stops:
            raise ValueError("stop may be one to four texts, none of them empty")
        return self


class StreamOptions(Body):
    include_usage: bool | None = None


class FunctionTool(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionTool


class JsonSchema(Body):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """With json_object, as llama.cpp takes it."""

    @model_validator(mode="after")
    def _checked(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format of type json_schema needs json_schema")
        return self


class StructuredOutputs(Body):
    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class ChatRequest(Sampled):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: list[Tool] | None = Field(None, min_length=1, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    prompt_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _checked_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only possible with logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not possible with stream: true")
        return self


class CompletionRequest(Sampled):
    prompt: str | list[int] | list[str] | list[list[int]] = "<|endoftext|>"
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = Field(None, ge=0, le=20)
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _checked_completion(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is only possible where it equals n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is only possible with echo: true")
        if self.prompt == []:
            raise ValueError("prompt is an empty list")
        if self.suffix and self.echo:
            raise ValueError("echo is not possible with suffix")
        return self


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(Body):
    model: str
    input: str | list[dict[str, Any]] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    tools: list[dict[str, Any]] | None = Field(None, max_length=256)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


class EmbeddingRequest(Body):
    model: str
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    """llama.cpp's name for it."""
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _checked(self) -> TokenizeRequest:
        if sum(x is not None for x in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("give one of prompt and messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


class ErrorObject(Body):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Body):
    error: ErrorObject
