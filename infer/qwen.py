"""A loaded model that answers: text in, text out, streaming or whole."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer.decode import MAX_STEPS, DecodeState, Produced, bucket, decode, half_bucket, pad_prompts, prefill, widen
from infer.prepare import prepare
from infer.sampling import Sampling, SamplingRows
from qwen_jax import chat
from qwen_jax.backend import Backend
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.model import Params, param_shardings
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.tokenizer import Tokenizer, check_tokenizer
from qwen_jax.weights.default_model import cache_folder
from qwen_jax.weights.load import load_params
from qwen_jax.weights.open import open_checkpoint

# Tokens between two looks at what the device has produced, while somebody reads along.
STREAM_STEPS = 4


@dataclasses.dataclass
class Answer:
    """One prompt's answer, growing while it is generated. `tokens` may end with a stop id, `text` does not."""

    prompt_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    """Of each token under the model's own distribution, before penalties, temperature and truncation."""
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


@dataclasses.dataclass
class Timing:
    """Seconds of wall time. Prefill ends with the first token, so its seconds are the time to first token."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


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
        donate: bool = False,
    ) -> None:
        """The model holds what `prepare` makes of `params`, which stay the caller's unless `donate`d.

        With a mesh, `params` lie on it as `model.param_shardings` says.
        """
        check_tokenizer(tokenizer, config)
        self.config = config
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.generation_config = dict(generation_config or {})
        self.backend = Backend.of(params)
        with self.entered():
            self.params = prepare(params, self.backend, donate=donate)
        self._generation = chat.generation_of(config, tokenizer)
        self.chat_template = tokenizer.chat_template or chat.default_template(self._generation)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The context in which this model's programs run: its backend and its mesh."""
        with self.backend.entered(), nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            yield

    # --- defaults of the checkpoint -----------------------------------------------------------------------------------

    @functools.cached_property
    def turns(self) -> chat.Turns:
        """Whether the checkpoint chats, and the ids that end an assistant's turn."""
        return chat.turns(
            self.tokenizer,
            self._generation,
            self.chat_template,
            self._declared_eos_ids,
            self.generation_config.get("chat_format"),
        )

    @property
    def is_chat_model(self) -> bool:
        return self.turns.is_chat

    @property
    def _declared_eos_ids(self) -> tuple[int, ...]:
        declared = self.generation_config.get("eos_token_id", ())
        return (declared,) if isinstance(declared, int) else tuple(declared)

    @property
    def _eos_ids(self) -> tuple[int, ...]:
        """What ends an answer: the end of a turn for a chat model, of a text for a base model."""
        if self.is_chat_model:
            return self.turns.stop_ids
        return tuple(dict.fromkeys((*self._declared_eos_ids, *self.tokenizer.eos_ids)))

    def sampling(self, **changes: Any) -> Sampling:
        """The checkpoint's own generation settings with `changes`; temperature=0 is greedy and without penalties."""
        declared = self.generation_config
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        settings = {name: declared[name] for name in names if declared.get(name) is not None}
        if not declared.get("do_sample", False):
            settings["temperature"] = 0.0
        settings.setdefault("temperature", 1.0)
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes.get("temperature") == 0:
            settings.pop("repetition_penalty", None)
        return Sampling(**(settings | changes))

    # --- prompts ------------------------------------------------------------------------------------------------------

    def chat_prompt(self, messages: str | Sequence[Mapping[str, Any]], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation (or of one user message) up to where the assistant answers."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        options = {"template": self.chat_template, "special_tokens": self.tokenizer.named_tokens} | template_kwargs
        return self.tokenizer.encode(chat.render(messages, **options))

    # --- answers ------------------------------------------------------------------------------------------------------

    def chat(self, messages: str | Sequence[Mapping[str, Any]], *, max_tokens: int = 512, **changes: Any) -> str:
        """The assistant's answer to a conversation, or to one user message; `changes` are Sampling's fields."""
        prompt = self.chat_prompt(messages)
        stop_ids = self.turns.stop_ids  # a base model does not stop by itself where a turn ends
        return self.generate([prompt], self.sampling(**changes), max_tokens=max_tokens, stop_ids=stop_ids)[0].text

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None, **kwargs: Any
    ) -> list[Answer]:
        """Whole answers to prompts, decoded together; arguments as `stream`."""
        stream = self.stream(prompts, sampling, steps=MAX_STEPS, **kwargs)
        for _ in stream:
            pass
        return stream.answers

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        top_logprobs: int = 0,
        steps: int = STREAM_STEPS,
    ) -> Stream:
        """Starts answering prompts (raw text or token ids); iterate to get (row, text) pieces as they come.

        sampling: one for all or one each; default the checkpoint's own. stop: texts that end an answer and are not part
        of it. stop_ids: token ids that end it, besides the checkpoint's own. top_logprobs: report the likeliest tokens
        at each position. steps: tokens between two pieces, at most 32.
        Raises InputError when a prompt is empty or does not fit the context.
        """
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        samplings = [sampling or self.sampling()] * len(ids) if not isinstance(sampling, Sequence) else list(sampling)
        if not ids or len(samplings) != len(ids):
            raise InputError(
                f"{len(ids)} prompts and {len(samplings)} samplings; give at least one prompt, a sampling each."
            )
        if not 1 <= steps <= MAX_STEPS:
            raise InputError(f"steps={steps} is not possible; it must be between 1 and {MAX_STEPS}.")
        if max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens} leaves nothing to generate; it must be at least 1.")
        if "" in stop:
            raise InputError("a stop text is empty; it would end every answer at once, so leave it out.")
        context = self.config.context_length
        for prompt in ids:
            if not prompt:
                raise InputError("a prompt is empty; give it at least one token.")
            if len(prompt) >= context:
                raise InputError(
                    f"a prompt of {len(prompt)} tokens does not fit the context of {context}; shorten it, or "
                    "extend the context with rope_scaling in config.json."
                )
            if not 0 <= min(prompt) <= max(prompt) < len(self.tokenizer):
                raise InputError(
                    f"a prompt has token ids from {min(prompt)} to {max(prompt)}; they must be at least 0 and below "
                    f"{len(self.tokenizer)}, the tokenizer's size."
                )
        all_stop_ids = (*self._eos_ids, *stop_ids)
        return Stream(self, ids, samplings, max_tokens, tuple(stop), all_stop_ids, top_logprobs, steps)


class Stream:
    """A running generation. Iterating yields (row, new text); `answers` and `timing` fill meanwhile."""

    def __init__(
        self,
        qwen: Qwen,
        prompts: list[list[int]],
        samplings: list[Sampling],
        max_tokens: int,
        stop: tuple[str, ...],
        stop_ids: tuple[int, ...],
        num_top: int,
        steps: int,
    ) -> None:
        self.answers = [Answer(len(prompt)) for prompt in prompts]
        self.timing = Timing(prompt_tokens=sum(map(len, prompts)))
        self._qwen, self._prompts, self._samplings = qwen, prompts, samplings
        self._stop, self._steps = stop, steps
        self._limits = [min(max_tokens, qwen.config.context_length - len(prompt)) for prompt in prompts]
        self._decoders = [qwen.tokenizer.stream(skip_special=True) for _ in prompts]
        self._held = [""] * len(prompts)  # text that may yet turn out to be the beginning of a stop text
        self._stop_ids = np.asarray(stop_ids, np.int32)
        self._static = {"config": qwen.config, "vocab_size": len(qwen.tokenizer), "num_top": num_top}

    def __iter__(self) -> Iterator[tuple[int, str]]:
        began = time.perf_counter()
        state, produced = self._prefill()
        tokens = np.asarray(produced.tokens)
        self.timing.prefill_seconds = time.perf_counter() - began
        yield from self._take(produced, tokens.shape[1])
        rows = max(state.tokens.shape[0], self._qwen.backend.min_decode_rows)
        if rows != state.tokens.shape[0]:
            with self._qwen.entered():
                state = widen(state, rows)
        while not all(answer.finish_reason for answer in self.answers):
            before = sum(len(answer.tokens) for answer in self.answers)
            began = time.perf_counter()
            finished = np.array([bool(a.finish_reason) for a in self.answers] + [True] * (rows - len(self.answers)))
            with self._qwen.entered():
                state, produced, steps = decode(
                    self._qwen.params,
                    state.replace(done=jnp.asarray(finished)),
                    np.int32(self._steps),
                    self._stop_ids,
                    **self._static,
                )
            count = int(steps)
            self.timing.decode_seconds += time.perf_counter() - began
            yield from self._take(produced, count)
            self.timing.decoded_tokens += sum(len(answer.tokens) for answer in self.answers) - before

    def _prefill(self) -> tuple[DecodeState, Produced]:
        config, rows = self._qwen.config, bucket(len(self._prompts))
        longest = max(map(len, self._prompts))
        length = min(half_bucket(longest, 32), config.context_length)
        needed = max(len(p) + limit for p, limit in zip(self._prompts, self._limits, strict=True))
        tokens, lengths = pad_prompts(self._prompts, rows, length)
        filler = rows - len(self._prompts)
        sampling_rows = None
        if not all(s.is_plain_greedy for s in self._samplings):
            sampling_rows = SamplingRows.create(
                self._samplings + [Sampling()] * filler, self._prompts + [[0]] * filler, config.vocab_size
            )
        with self._qwen.entered():
            return prefill(
                self._qwen.params,
                tokens,
                lengths,
                np.array(self._limits + [0] * filler, np.int32),
                sampling_rows,
                self._stop_ids,
                capacity=max(half_bucket(needed, 256), length),
                **self._static,
            )

    def _take(self, produced: Produced, count: int) -> Iterator[tuple[int, str]]:
        """Adds `count` columns of new tokens to the unfinished answers and yields what can be shown of them."""
        fields = (produced.tokens, produced.logprobs, produced.top_tokens, produced.top_logprobs)
        tokens, logprobs, top_tokens, top_logprobs = (np.asarray(x[:, :count]).tolist() for x in fields)
        for row, answer in enumerate(self.answers):
            for i in range(count):
                if answer.finish_reason:
                    break
                answer.tokens.append(tokens[row][i])
                answer.logprobs.append(logprobs[row][i])
                if top_tokens[row][i]:
                    answer.top_logprobs.append(list(zip(top_tokens[row][i], top_logprobs[row][i], strict=True)))
                if piece := self._accept(row, answer):
                    answer.text += piece
                    yield row, piece

    def _accept(self, row: int, answer: Answer) -> str:
        """The text that the newest token settles, which may end the answer."""
        token = answer.tokens[-1]
        text = self._held[row]
        if token in self._stop_ids:
            answer.finish_reason = "stop"
        else:
            text += self._decoders[row].add(token)
            if len(answer.tokens) >= self._limits[row]:
                answer.finish_reason = "length"
        if answer.finish_reason:
            text += self._decoders[row].flush()
        found = [at for mark in self._stop if (at := text.find(mark)) >= 0]
        if found:
            answer.finish_reason, self._held[row] = "stop", ""
            return text[: min(found)]
        keep = 0
        if not answer.finish_reason:
            keep = max((n for mark in self._stop for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
        self._held[row] = text[len(text) - keep :]
        return text[: len(text) - keep]


def load(
    model: str | Path = "default",
    *,
    dtype: str = "bfloat16",
    mesh: MeshConfig | str | None = None,
    progress: bool = True,
) -> Qwen:
    """Loads "default", a local folder, a .gguf file or a Hugging Face id; caches compiled programs.

    mesh: how to split the model over all devices, such as "tensor=4", each shard read straight to its device; default
    the first device alone. Raises InputError if the model does not divide.
    """
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"dtype {dtype!r} is not possible; use bfloat16, float16 or float32.")
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
    checkpoint = open_checkpoint(model)
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    on_mesh = shardings = None
    if mesh is not None:
        on_mesh = make_mesh(MeshConfig.parse(mesh) if isinstance(mesh, str) else mesh, model=config)
        shardings = param_shardings(config, on_mesh)
    params = load_params(checkpoint, jnp.dtype(dtype), shardings, progress=progress)
    return Qwen(config, params, tokenizer, checkpoint.generation_config(), on_mesh, donate=True)
