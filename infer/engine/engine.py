"""Requests in, tokens out: at every step some may join, some may leave, and the rest go on."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from infer.decode import MAX_STEPS, DecodeState, Produced, bucket, decode
from infer.engine.pages import PagePool, page_keys
from infer.engine.programs import read
from infer.sampling import Sampling, SamplingRows
from infer.stops import AnswerText
from infer.stream import NO_ID, TOP, Answer, Asked
from qwen_jax.config import DynamicNtkScaling
from qwen_jax.errors import InputError
from qwen_jax.paged_cache import PagedCache, paged_cache

if TYPE_CHECKING:
    from infer.qwen import Prompts, Qwen


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and its answer. The lists of ids, and `held`, are all that there is to know to go on anywhere."""

    asked: Asked
    num_top: int
    text: AnswerText
    answer: Answer
    pages: list[int] = dataclasses.field(default_factory=list)
    held: int = 0
    """Tokens whose keys and values lie in the pages."""
    keys: list[bytes] = dataclasses.field(default_factory=list)
    """Of the whole pages so far."""
    cached: int = 0
    """Tokens of the prompt that were found in pages of earlier requests."""
    cancelled: bool = False

    @property
    def tokens(self) -> list[int]:
        return self.asked.prompt + self.answer.tokens

    @property
    def to_read(self) -> int:
        """Tokens that have to be in the cache before the next one is chosen, but for the last of an answer."""
        return len(self.asked.prompt) + max(0, len(self.answer.tokens) - 1)

    @property
    def is_over(self) -> bool:
        return self.cancelled or self.answer.finish_reason is not None


class Engine:
    """Answers any number of requests with a few programs, `rows` of them at a time.

    A step reads one piece of at most one prompt, then decodes up to `steps` tokens of every request that is read. Keys
    and values lie in `num_pages` pages of `page` tokens; those of a finished request stay until there is no room, so
    that a prompt which begins like an earlier one is read from where they differ. Where pages run out, the youngest
    request gives its own back and is read again later, with the same answer: randomness depends on a request's seed and
    the number of its token only.

    The host knows all of a request; devices hold keys, values and weights. Not for a mesh, see `PagedCache`.
    """

    def __init__(
        self,
        qwen: Qwen,
        *,
        rows: int = 16,
        num_pages: int | None = None,
        page: int = 128,
        piece: int = 512,
        steps: int = 8,
        cache_dtype: Any = None,
    ) -> None:
        """num_pages: default room for `rows` requests of 4,096 tokens, or of the whole context where that is shorter.

        piece: tokens of a prompt that are read in one step, whole pages. cache_dtype: default that of activations, or
        what the backend keeps; int8 with scales. Raises InputError for sizes that do not fit each other.
        """
        if min(rows, page, piece) < 1 or piece % page:
            raise InputError(f"piece={piece} must be a multiple of page={page}, and rows at least 1.")
        if not 1 <= steps <= MAX_STEPS:
            raise InputError(f"steps={steps} is not possible; it must be between 1 and {MAX_STEPS}.")
        if num_pages is not None and num_pages < 2:
            raise InputError(f"num_pages={num_pages} leaves no page for a request; give at least 2.")
        if qwen.mesh is not None:
            raise InputError("an engine's pages lie on one device; load the model without a mesh.")
        self._qwen, self._config = qwen, qwen.config
        self._rows, self._page, self._piece, self._steps = rows, page, piece, steps
        if num_pages is None:
            num_pages = 1 + rows * -(-min(qwen.config.context_length, 4096) // page)
        self.pool = PagePool(num_pages)
        dtype = cache_dtype or qwen.backend.cache_dtype or qwen.params["embed"]["embedding"].dtype
        nothing = jnp.zeros((1, 1), jnp.int32)
        with qwen.entered():
            cache = paged_cache(qwen.config, num_pages, page, dtype, tables=nothing, prompt_lengths=nothing[0])
        self._layers = cache.layers
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in the order in which they were admitted

    # --- requests -----------------------------------------------------------------------------------------------------

    def add(self, prompt: Any, sampling: Sampling | None = None, *, top_logprobs: int = 0, **kwargs: Any) -> Request:
        """Queues a prompt (text or token ids); arguments as `Qwen.stream`. Raises InputError where it never fits."""
        (asked,) = self._qwen.asked([prompt], sampling, top_logprobs=top_logprobs, **kwargs)
        return self._queue(asked, top_logprobs)

    def _queue(self, asked: Asked, num_top: int) -> Request:
        needed = min(len(asked.prompt) + asked.limit, self._config.context_length)
        if -(-needed // self._page) > self.pool.num_pages - 1:
            raise InputError(
                f"a prompt of {len(asked.prompt)} tokens and an answer of {asked.limit} need more than the engine's "
                f"{self.pool.num_pages - 1} pages of {self._page}; ask for fewer tokens, or give it more pages."
            )
        text = AnswerText(self._qwen.tokenizer, asked.stop, frozenset(asked.stop_ids), asked.limit)
        request = Request(asked, num_top, text, Answer(len(asked.prompt)))
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request, whose answer stays what it is; its pages are free with the next step."""
        request.cancelled = True

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def generate(
        self, prompts: Prompts, sampling: Sampling | Sequence[Sampling] | None = None, **kwargs: Any
    ) -> list[Answer]:
        """Whole answers to prompts, however many; arguments as `Qwen.stream`."""
        num_top = kwargs.get("top_logprobs", 0)
        requests = [self._queue(asked, num_top) for asked in self._qwen.asked(prompts, sampling, **kwargs)]
        while not all(request.is_over for request in requests):
            self.step()
        return [request.answer for request in requests]

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Request, str]]:
        """Moves everything on, and gives the new text of each request that has some."""
        self._retire()
        self._admit()
        pieces = []
        if reading := next((request for request in self._running if request.held < request.to_read), None):
            pieces += self._read(reading)
        pieces += self._decode()
        self._retire()
        return pieces

    def _retire(self) -> None:
        for request in [request for request in self._running if request.is_over]:
            self._leave(request)
        self._waiting = deque(request for request in self._waiting if not request.is_over)

    def _admit(self) -> None:
        """Lets the oldest in while there is a row for it, and room for what it has to read."""
        while self._waiting and len(self._running) < self._rows:
            request = self._waiting[0]
            request.keys = list(page_keys(request.tokens[: request.to_read], self._page, self._salt(request)))
            # the last token is read in any case: what follows it is not known
            known = self.pool.match(request.keys[: (request.to_read - 1) // self._page])
            needed = -(-request.to_read // self._page) - len(known)
            # one page for each that is running, so that nobody is let in to give way at once
            taken = self.pool.take(needed) if needed + len(self._running) <= self.pool.available else None
            if taken is None:
                self.pool.release(known)
                return
            request.pages, request.held = known + taken, len(known) * self._page
            request.cached = min(request.held, len(request.asked.prompt))
            self._running.append(self._waiting.popleft())

    def _salt(self, request: Request) -> bytes:
        """What keys and values depend on besides the tokens: Qwen1 turns them by the whole prompt's length."""
        by_length = isinstance(self._config.rope_scaling, DynamicNtkScaling)
        return str(len(request.asked.prompt)).encode() if by_length else b""

    def _leave(self, request: Request) -> None:
        """Takes a request out, and its pages, of which the whole ones stay for others to find."""
        self._running.remove(request)
        keys = page_keys(request.tokens[: request.held], self._page, self._salt(request))
        for page, key in zip(request.pages, keys, strict=False):
            self.pool.publish(page, key)
        self.pool.release(request.pages)
        request.pages, request.held = [], 0

    def _read(self, request: Request) -> list[tuple[Request, str]]:
        """Reads one piece, and after the last of a prompt chooses the answer's first token."""
        begin = request.held
        end = min(begin + self._piece - begin % self._piece, request.to_read)
        tokens = np.zeros((1, bucket(end - begin, min(64, self._piece))), np.int32)
        tokens[0, : end - begin] = request.tokens[begin:end]
        last = end == request.to_read and not request.answer.tokens
        with self._qwen.entered():
            cache, produced = read(
                self._qwen.params,
                self._cache([request], 1),
                tokens,
                np.int32(end - begin),
                self._sampling([request]) if last else None,
                self._stop_ids([request]) if last else np.zeros((1, 1), np.int32),
                **self._static,
                last=last,
            )
        self._layers = cache.layers
        request.held = end
        if end // self._page > begin // self._page:
            for page, key in zip(request.pages[: end // self._page], request.keys, strict=False):
                self.pool.publish(page, key)
        return self._take([request], produced, 1) if produced is not None else []

    def _decode(self) -> list[tuple[Request, str]]:
        ready = [request for request in self._running if request.held == request.to_read and not request.is_over]
        steps = 1 if any(request.asked.sampling.needs_history for request in ready) else self._steps
        ready = self._with_room(ready, steps)
        if not ready:
            return []
        rows = max(bucket(len(ready)), self._qwen.backend.min_decode_rows)
        nobody = Request(Asked([0], Sampling(), 0, (), ()), 0, ready[0].text, Answer(1), held=0)
        padding = [nobody] * (rows - len(ready))
        all_rows = ready + padding
        state = DecodeState(
            cache=self._cache(all_rows, rows),
            tokens=jnp.array([request.tokens[-1] for request in all_rows], jnp.int32),
            steps=jnp.array([len(request.answer.tokens) for request in all_rows], jnp.int32),
            limits=jnp.array([request.asked.limit for request in all_rows], jnp.int32),
            done=jnp.arange(rows) >= len(ready),
            rows=self._sampling(all_rows),
        )
        with self._qwen.entered():
            state, produced, count = decode(
                self._qwen.params, state, np.int32(steps), self._stop_ids(all_rows), **self._static
            )
        assert isinstance(state.cache, PagedCache)
        self._layers = state.cache.layers
        return self._take(ready, produced, int(count))

    def _with_room(self, ready: list[Request], steps: int) -> list[Request]:
        """Those that have pages for the tokens of a call, the youngest giving up theirs where there are too few."""
        kept = []
        for request in ready:
            if request not in self._running:  # it gave way to an older one
                continue
            end = min(request.held + steps, len(request.asked.prompt) + request.asked.limit)
            missing = max(0, -(-end // self._page) - len(request.pages))
            taken = None
            while request in self._running and (taken := self.pool.take(missing)) is None:
                youngest = self._running[-1]
                self._leave(youngest)
                self._waiting.appendleft(youngest)
            if taken is not None:
                request.pages += taken
                kept.append(request)
        return [request for request in kept if request in self._running]

    def _take(self, requests: list[Request], produced: Produced, count: int) -> list[tuple[Request, str]]:
        """Gives each request its new tokens, `count` at most."""
        tokens, logprobs, top_tokens, top_logprobs = (
            np.asarray(x[:, :count]).tolist()
            for x in (produced.tokens, produced.logprobs, produced.top_tokens, produced.top_logprobs)
        )
        pieces = []
        for row, request in enumerate(requests):
            answer, shown = request.answer, ""
            first = not answer.tokens
            for i in range(count):
                if request.is_over:
                    break
                top = list(zip(top_tokens[row][i], top_logprobs[row][i], strict=True))[: request.num_top]
                shown += answer.add(tokens[row][i], logprobs[row][i], top, request.text)
                # a token enters the cache when the next one is chosen
                request.held += 0 if first and i == 0 else 1
            if shown:
                pieces.append((request, shown))
        return pieces

    # --- what programs are given --------------------------------------------------------------------------------------

    @property
    def _static(self) -> dict[str, Any]:
        return {"config": self._config, "vocab_size": len(self._qwen.tokenizer), "num_top": TOP}

    def _cache(self, requests: list[Request], rows: int) -> PagedCache:
        """The pages as these rows see them. Tables are as long as the longest needs, in powers of two."""
        width = bucket(max(len(request.pages) for request in requests), 4)
        tables = np.full((rows, width), self.pool.num_pages, np.int32)  # no page: what is written there is dropped
        for row, request in enumerate(requests):
            tables[row, : len(request.pages)] = request.pages or [0]
        lengths = np.array([request.held for request in requests], np.int32)
        prompts = np.array([len(request.asked.prompt) for request in requests], np.int32)
        return PagedCache(self._layers, *map(jnp.asarray, (tables, lengths, prompts)))

    def _sampling(self, requests: list[Request]) -> SamplingRows:
        return SamplingRows.create(
            [request.asked.sampling for request in requests],
            [request.asked.prompt for request in requests],
            self._config.vocab_size,
            report=any(request.num_top for request in requests),
            answers=[request.answer.tokens for request in requests],
        )

    def _stop_ids(self, requests: list[Request]) -> np.ndarray:
        """[rows, n], filled up with what is no id."""
        width = bucket(max(len(request.asked.stop_ids) for request in requests), 16)
        return np.array(
            [[*ids, *[NO_ID] * (width - len(ids))] for ids in (x.asked.stop_ids for x in requests)], np.int32
        )
