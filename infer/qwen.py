"""A loaded model that answers: text in, text out, streaming or whole."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import numbers
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer.decode import MAX_STEPS
from infer.generation_config import GenerationConfig
from infer.prepare import prepare
from infer.sampling import Sampling
from infer.stream import TOP, Answer, Asked, Stream
from qwen_jax import chat
from qwen_jax.backend import Backend
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels import native
from qwen_jax.local_path import cache_folder
from qwen_jax.model import Params, param_shardings
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.tokenizer import Generation, Tokenizer, check_tokenizer
from qwen_jax.weights.load import load_params
from qwen_jax.weights.open import GgufCheckpoint, open_checkpoint
from qwen_jax.weights.peft import apply_adapter, read_adapter

log = logging.getLogger("qwen_jax")

# Tokens between two looks at what the device has produced, while somebody reads along.
STREAM_STEPS = 4
# Tokens of an answer where neither the caller nor the checkpoint says it.
MAX_TOKENS = 512

# A text, token ids, or a list of these.
Prompts = str | np.ndarray | jax.Array | Sequence[Any]


class Qwen:
    """Configuration, parameters and tokenizer of one model, with the programs that run it."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        generation_config: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
        *,
        backend: Backend | None = None,
        donate: bool = False,
    ) -> None:
        """The model holds what `prepare` makes of `params`, which stay the caller's unless `donate`d.

        With a mesh, `params` lie on it as `model.param_shardings` says. backend: default that of where they lie.
        """
        check_tokenizer(tokenizer, config)
        self.config = config
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.generation_config = generation_config or {}
        GenerationConfig.parse(self.generation_config)  # which refuses what cannot be obeyed
        self.backend = backend or Backend.of(params)
        with self.entered():
            self.params = prepare(params, self.backend, donate=donate)
        self._generation: Generation = chat.generation_of(config, tokenizer)
        self.chat_template = tokenizer.chat_template or chat.default_template(self._generation)

    def with_adapter(self, folder: str | Path) -> Qwen:
        """This model with a PEFT folder's adapter added: programs of its own, and the same weights, none copied.

        So several adapters stand beside each other, and beside the model without any.
        """
        other = copy.copy(self)
        other.params = apply_adapter(self.params, read_adapter(folder, self.config))
        return other

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The context in which this model's programs run: its backend and its mesh."""
        with self.backend.entered(), nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            yield

    # --- defaults of the checkpoint -----------------------------------------------------------------------------------

    @property
    def defaults(self) -> GenerationConfig:
        """What the checkpoint's generation_config.json says."""
        return GenerationConfig.parse(self.generation_config)

    @functools.cached_property
    def turns(self) -> chat.Turns:
        """Whether the checkpoint chats, and the ids that end an assistant's turn."""
        declared = self.defaults
        return chat.turns(
            self.tokenizer, self._generation, self.chat_template, declared.eos_token_ids, declared.chat_format
        )

    @property
    def is_chat_model(self) -> bool:
        return self.turns.is_chat

    @property
    def _eos_ids(self) -> tuple[int, ...]:
        """What ends an answer: the end of a turn for a chat model, of a text for a base model."""
        if self.is_chat_model:
            return self.turns.stop_ids
        return tuple(dict.fromkeys((*self.defaults.eos_token_ids, *self.tokenizer.eos_ids)))

    def sampling(self, **changes: Any) -> Sampling:
        """The checkpoint's own generation settings with `changes`; temperature=0 is greedy and without penalties."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes.get("temperature") == 0:
            changes = {"repetition_penalty": 1.0} | changes
        return dataclasses.replace(self.defaults.sampling, **changes)

    def _limit(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """Tokens that the answer to a prompt may have."""
        declared = self.defaults
        if max_tokens is None:
            max_tokens = declared.max_tokens
        if max_tokens is None and declared.max_length is not None:
            max_tokens = max(1, declared.max_length - len(prompt))
        return min(MAX_TOKENS if max_tokens is None else max_tokens, self.config.context_length - len(prompt))

    # --- prompts ------------------------------------------------------------------------------------------------------

    def chat_prompt(self, messages: str | Sequence[Mapping[str, Any]], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation (or of one user message) up to where the assistant answers."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        options: dict[str, Any] = {"template": self.chat_template, "special_tokens": self.tokenizer.named_tokens}
        return self.tokenizer.encode(chat.render(messages, **options | template_kwargs))

    # --- answers ------------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        **changes: Any,
    ) -> str:
        """The assistant's answer to a conversation, or to one user message.

        tools: OpenAI tool objects; `chat.parse_tool_calls` finds calls in the answer. enable_thinking: for templates
        that know it; template_kwargs: their further variables. changes: fields of `Sampling`.
        """
        options = dict(template_kwargs or {})
        if enable_thinking is not None:
            options["enable_thinking"] = enable_thinking
        prompt = self.chat_prompt(messages, tools=tools, **options)
        stop_ids = self.turns.stop_ids  # a base model does not stop by itself where a turn ends
        return self.generate([prompt], self.sampling(**changes), max_tokens=max_tokens, stop=stop, stop_ids=stop_ids)[
            0
        ].text

    def generate(
        self, prompts: Prompts, sampling: Sampling | Sequence[Sampling] | None = None, **kwargs: Any
    ) -> list[Answer]:
        """Whole answers to prompts, decoded together; arguments as `stream`."""
        stream = self.stream(prompts, sampling, steps=MAX_STEPS, **kwargs)
        for _ in stream:
            pass
        return stream.answers

    def stream(
        self,
        prompts: Prompts,
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: int | Sequence[int] = (),
        top_logprobs: int = 0,
        steps: int = STREAM_STEPS,
    ) -> Stream:
        """Starts answering prompts (raw text or token ids), or one; iterate to get (row, text) pieces as they come.

        sampling: one each or one for all, of which equal prompts get different seeds; default the checkpoint's own.
        max_tokens: of an answer; default the checkpoint's own, else MAX_TOKENS. stop: a text or texts that end an
        answer and are not part of it; stop_ids: token ids that end it; both besides the checkpoint's own. top_logprobs:
        report so many of the likeliest tokens at each position, at most TOP. steps: tokens between two pieces, at most
        MAX_STEPS.
        Raises InputError when a prompt is empty or does not fit the context, and, while iterating, when the model's
        logits are not finite.
        """
        if not 1 <= steps <= MAX_STEPS:
            raise InputError(f"steps={steps} is not possible; it must be between 1 and {MAX_STEPS}.")
        options = {"max_tokens": max_tokens, "stop": stop, "stop_ids": stop_ids, "top_logprobs": top_logprobs}
        return Stream(self, self.asked(prompts, sampling, **options), top_logprobs, steps)

    def asked(
        self,
        prompts: Prompts,
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: int | Sequence[int] = (),
        top_logprobs: int = 0,
    ) -> list[Asked]:
        """What is asked for with each prompt, the checkpoint's own settings included; arguments as `stream`."""
        ids = self._prompt_ids(prompts)
        if isinstance(sampling, Sequence):
            samplings = list(sampling)
        else:
            samplings = _with_seeds(sampling or self.sampling(), ids)
        if not ids or len(samplings) != len(ids):
            raise InputError(
                f"{len(ids)} prompts and {len(samplings)} samplings; give at least one prompt, a sampling each."
            )
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens} leaves nothing to generate; it must be at least 1.")
        if not 0 <= top_logprobs <= TOP:
            raise InputError(f"top_logprobs={top_logprobs} is not possible; it must be between 0 and {TOP}.")
        texts = [stop] if isinstance(stop, str) else list(stop or ())
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"stop={stop!r} is not possible; give a text or a list of texts.")
        if "" in texts:
            raise InputError("a stop text is empty; it would end every answer at once, so leave it out.")
        ends = [stop_ids] if isinstance(stop_ids, int) else list(stop_ids)
        defaults = self.defaults
        ends += [word[0] for word in defaults.stop_words_ids if len(word) == 1]
        texts += [*defaults.stop, *(self.tokenizer.decode(word) for word in defaults.stop_words_ids if len(word) > 1)]
        return [
            Asked(prompt, each, self._limit(prompt, max_tokens), tuple(texts), (*self._eos_ids, *ends))
            for prompt, each in zip(ids, samplings, strict=True)
        ]

    def _prompt_ids(self, prompts: Prompts) -> list[list[int]]:
        """Each prompt's token ids. Raises InputError for what is no prompt."""
        if isinstance(prompts, str) or (len(prompts) and _are_ids(prompts)):  # an empty list is none
            prompts = [prompts]
        ids, context = [], self.config.context_length
        for prompt in prompts:
            if not isinstance(prompt, str) and not _are_ids(prompt):
                raise InputError(f"a prompt must be text or a list of token ids, got {type(prompt).__name__}.")
            found = self.tokenizer.encode(prompt) if isinstance(prompt, str) else np.asarray(prompt).tolist()
            if not found:
                raise InputError("a prompt is empty; give it at least one token.")
            if len(found) >= context:
                raise InputError(
                    f"a prompt of {len(found)} tokens does not fit the context of {context}; shorten it, or "
                    "extend the context with rope_scaling in config.json."
                )
            if not 0 <= min(found) <= max(found) < len(self.tokenizer):
                raise InputError(
                    f"a prompt has token ids from {min(found)} to {max(found)}; they must be at least 0 and below "
                    f"{len(self.tokenizer)}, the tokenizer's size."
                )
            ids.append(found)
        return ids


def _are_ids(prompt: Any) -> bool:
    """Whether a value is one prompt of token ids."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence | np.ndarray | jax.Array):
        return False
    if isinstance(prompt, Sequence):
        return all(isinstance(id, numbers.Integral) and not isinstance(id, bool) for id in prompt)
    return prompt.ndim == 1 and np.issubdtype(prompt.dtype, np.integer)


def _with_seeds(sampling: Sampling, prompts: list[list[int]]) -> list[Sampling]:
    """The sampling of each prompt: that given, with the next seed for every time the same prompt comes again."""
    seen: Counter[tuple[int, ...]] = Counter()
    samplings = []
    for prompt in map(tuple, prompts):
        samplings.append(dataclasses.replace(sampling, seed=(sampling.seed + seen[prompt]) % 2**32))
        seen[prompt] += 1
    return samplings


def load(
    model: str | Path = "default",
    *,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    mesh: MeshConfig | str | None = None,
    dequantise: bool | None = None,
    adapter: str | Path | None = None,
    progress: bool = True,
) -> Qwen:
    """Loads "default", a local folder, a .gguf file or a Hugging Face id; caches compiled programs.

    dtype: of weights and activations; or "int8", in which products round activations to int8. On CPUs 32 at a time, as
    llama.cpp does: weights keep the few bits of their file, and dense ones become Q8_0. On TPUs a token at a time: int8
    weights stay so (W8A8), and dense projections become it. Elsewhere it is bfloat16, and a warning says so.
    cache_dtype: of keys and values that are kept: "int8", with a scale for each; default that of the activations.
    dequantise: widen quantised weights to `dtype` as they are read, which takes more memory; default for GGUF alone.
    adapter: a PEFT folder, added to the weights as they are; see also `Qwen.with_adapter`.
    mesh: how to split the model over all devices, such as "tensor=4", each shard read straight to its device; default
    the first device alone. Raises InputError if the model does not divide.
    """
    if dtype not in ("bfloat16", "float16", "float32", "int8"):
        raise InputError(f"dtype {dtype!r} is not possible; use bfloat16, float16, float32 or int8.")
    if cache_dtype not in (None, "int8"):
        raise InputError(f"cache_dtype {cache_dtype!r} is not possible; use int8, or leave it out.")
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
    checkpoint = open_checkpoint(model)
    tokenizer, config, generation_config = checkpoint.tokenizer(), checkpoint.config, checkpoint.generation_config()
    GenerationConfig.parse(generation_config)  # before the weights are read for nothing
    low_rank = None if adapter is None else read_adapter(adapter, config)
    on_mesh = shardings = None
    if mesh is not None:
        on_mesh = make_mesh(MeshConfig.parse(mesh) if isinstance(mesh, str) else mesh, model=config)
        shardings = param_shardings(config, on_mesh)
    backend = None
    if dtype == "int8":
        if Backend.of(on_mesh).kernels == "tpu":
            dtype, backend = "bfloat16", dataclasses.replace(Backend.of(on_mesh), integer_products=True)
        elif reason := _why_no_int8(on_mesh):
            dtype = "bfloat16"
            log.warning("int8 is not possible, because %s; computing in bfloat16, slower and with more memory.", reason)
        else:
            backend = dataclasses.replace(Backend.of(None), native=True)
    is_gguf = isinstance(checkpoint, GgufCheckpoint)
    if dequantise is None:  # for GGUF's blocks there is no other fast product
        dequantise = is_gguf and dtype != "int8"
    # with native kernels dense weights are rounded from what is stored, and GGUF's norms are float32
    stored = jnp.dtype(dtype) if dtype != "int8" else jnp.dtype(jnp.float32) if is_gguf else None
    params = load_params(checkpoint, stored, shardings, dequantise=dequantise, progress=progress)
    if low_rank is not None:
        params = apply_adapter(params, low_rank)
    if cache_dtype is not None:
        backend = dataclasses.replace(backend or Backend.of(on_mesh), cache_dtype=jnp.dtype(cache_dtype))
    return Qwen(config, params, tokenizer, generation_config, on_mesh, backend=backend, donate=True)


def _why_no_int8(mesh: Mesh | None) -> str | None:
    if mesh is not None or Backend.of(None).kernels != "cpu":
        return "its kernels are for one CPU"
    return native.why_not()
