"""Requests in, tokens out: at every step some may join, some may leave, and the rest go on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.decode import MAX_STEPS, DecodeState, Produced, bucket, decode
from infer.engine.drafts import DRAFTED, DRAFTING
from infer.engine.pages import PagePool, page_keys
from infer.engine.programs import Scores, read, verify
from infer.engine.request import PromptToken, Request
from infer.sampling import Sampling, SamplingRows
from infer.stops import AnswerText
from infer.stream import NO_ID, TOP, Answer, Asked
from qwen_jax.config import DynamicNtkScaling
from qwen_jax.errors import InputError
from qwen_jax.paged_cache import PagedCache, paged_cache

if TYPE_CHECKING:
    from infer.grammar import Grammar
    from infer.qwen import Prompts, Qwen
    from qwen_jax.model import Params


@dataclasses.dataclass
class Counts:
    """What an engine has done since it began."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of these, what was found in pages of earlier requests."""
    answer_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Of these, what came true."""
    preemptions: int = 0
    steps: int = 0


class Engine:
    """Answers any number of requests with a few programs, `rows` of them at a time.

    A step reads up to `piece` tokens of prompts, then decodes up to `steps` tokens of every request that is read, but
    one while others are still to be read. Keys and values lie in `num_pages` pages of `page` tokens; those of a
    finished request stay until there is no room, so that a prompt which begins like an earlier one is read from where
    they differ. Where pages run out, the youngest request gives its own back and is read again later, with the same
    answer: randomness depends on a request's seed and the number of its token only.

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
        self.qwen, self._config = qwen, qwen.config
        self.rows, self._page, self._piece, self._steps = rows, page, piece, steps
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
        self._sampled: tuple[list[Request], SamplingRows] | None = None  # the rows of the last call, and what they saw
        self._read_short = False
        self.counts = Counts()
        self.compiled: set[tuple[Any, ...]] = set()
        """Which programs have run, by their names and shapes."""

    @property
    def capacity(self) -> int:
        """Tokens that one request may have, its answer included."""
        return min(self._config.context_length, (self.pool.num_pages - 1) * self._page)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    # --- requests -----------------------------------------------------------------------------------------------------

    def request(
        self,
        prompt: Any,
        sampling: Sampling | None = None,
        *,
        top_logprobs: int = 0,
        grammar: Grammar | None = None,
        prompt_logprobs: bool = False,
        answers: bool = True,
        **kwargs: Any,
    ) -> Request:
        """What is asked with a prompt (text or token ids). Raises InputError where it never fits.

        grammar: what the answer has to look like. prompt_logprobs: report the prompt's own tokens, with as many of the
        likeliest as `top_logprobs` says. answers: whether an answer is wanted, or only what reading the prompt gives.
        The rest is as in `Qwen.stream`.
        """
        (asked,) = self.qwen.asked([prompt], sampling, top_logprobs=top_logprobs, **kwargs)
        if not answers:
            asked = dataclasses.replace(asked, limit=0)
        form = grammar and grammar.matcher()
        return self._request(asked, top_logprobs, matcher=form, wants_prompt_logprobs=prompt_logprobs)

    def _request(self, asked: Asked, num_top: int, **kwargs: Any) -> Request:
        needed = min(len(asked.prompt) + asked.limit, self._config.context_length)
        if needed > self.capacity:
            raise InputError(
                f"a prompt of {len(asked.prompt)} tokens and an answer of {asked.limit} need more than the engine's "
                f"{self.pool.num_pages - 1} pages of {self._page}; ask for fewer tokens, or give it more pages."
            )
        text = AnswerText(self.qwen.tokenizer, asked.stop, frozenset(asked.stop_ids), asked.limit)
        return Request(asked, num_top, text, Answer(len(asked.prompt)), **kwargs)

    def enqueue(self, request: Request) -> None:
        """Lets a new request wait for its turn."""
        self._waiting.append(request)

    def add(self, prompt: Any, sampling: Sampling | None = None, **kwargs: Any) -> Request:
        """Makes a request, arguments as `request`, and lets it wait for its turn."""
        request = self.request(prompt, sampling, **kwargs)
        self.enqueue(request)
        return request

    def described(self) -> str:
        """What fits, for people."""
        tokens = (self.pool.num_pages - 1) * self._page
        size = sum(x.nbytes for x in jax.tree.leaves(self._layers)) / 2**30
        return (
            f"{tokens:,} tokens of keys and values ({size:.2f} GiB), that is {tokens / self.capacity:.1f} contexts of "
            f"{self.capacity:,}, for up to {self.rows} requests at a time"
        )

    def programs(self) -> list[Callable[[], Any]]:
        """Runs on nothing of every program that requests need, the first answer's first: each compiles one.

        But for those that score the tokens of prompts.
        """
        nobody = self.request([0], Sampling(), max_tokens=1)
        lengths = {bucket(length, min(64, self._piece)) for length in range(1, self._piece + 1)}
        reads = [
            functools.partial(self._run_read, nobody, np.zeros((1, length), np.int32), 1, None)
            for length in sorted(lengths)
        ]
        rows = sorted({bucket(rows) for rows in range(1, self.rows + 1)})
        decodes = [functools.partial(self._run_decode, [], 0, count) for count in rows]
        verifies = [functools.partial(self._run_verify, [], [], count) for count in rows if count <= DRAFTING]
        each = itertools.zip_longest(reads, decodes, verifies)
        return [program for some in each for program in some if program]

    def cancel(self, request: Request) -> None:
        """Ends a request, whose answer stays what it is; its pages are free with the next step."""
        request.cancelled = True

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def replace_params(self, params: Params) -> None:
        """Goes on with other weights, of the same shapes and as `prepare` leaves them; nothing read before is kept."""
        self.qwen.params = params
        for request in reversed(self._running.copy()):
            self._leave(request)
            self._waiting.appendleft(request)
        self.pool.forget()

    def generate(
        self, prompts: Prompts, sampling: Sampling | Sequence[Sampling] | None = None, **kwargs: Any
    ) -> list[Answer]:
        """Whole answers to prompts, however many; arguments as `Qwen.stream`."""
        num_top = kwargs.get("top_logprobs", 0)
        requests = [self._request(asked, num_top) for asked in self.qwen.asked(prompts, sampling, **kwargs)]
        self._waiting += requests
        while not all(request.is_over for request in requests):
            self.step()
        return [request.answer for request in requests]

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Request, str]]:
        """Moves everything on, and gives the new text of each request that has some."""
        self._retire()
        self._admit()
        pieces, room = [], self._piece
        while room > 0 and (reading := self._next_to_read()):
            before = reading.held
            pieces += self._read(reading)
            room -= reading.held - before
            self._admit()  # whose prompt begins as this one, and waited for it
        pieces += self._decode()
        self._retire()
        self.counts.steps += 1
        return pieces

    def _unread(self) -> list[Request]:
        return [request for request in self._running if request.held < request.to_read and not request.is_over]

    def _next_to_read(self) -> Request | None:
        """The oldest prompt that is not read; a short one in turn with one of more than 8 pieces."""
        unread = self._unread()
        if not unread:
            return None
        rest = [request.to_read - request.held for request in unread]
        short = next((request for request, left in zip(unread, rest, strict=True) if left <= self._piece), None)
        self._read_short = not self._read_short
        return short if short and self._read_short and rest[0] > 8 * self._piece else unread[0]

    def _retire(self) -> None:
        for request in [request for request in self._running if request.is_over]:
            self._leave(request)
        self._waiting = deque(request for request in self._waiting if not request.is_over)

    def _admit(self) -> None:
        """Lets the oldest in while there is a row for it, and room for what it has to read."""
        while self._waiting and len(self._running) < self.rows:
            request = self._waiting[0]
            request.keys = list(page_keys(request.tokens[: request.to_read], self._page, self._salt(request)))
            # the last token is read in any case: what follows it is not known
            matched = request.keys[: (request.to_read - 1) // self._page]
            if request.wants_prompt_logprobs and not request.answer.tokens:
                matched, request.prompt_logprobs = [], []
            known = self.pool.match(matched)
            if self._is_being_read(matched[len(known) : len(known) + 1]):
                self.pool.release(known)
                return
            needed = -(-request.to_read // self._page) - len(known)
            # one page for each that is running, so that nobody is let in to give way at once
            taken = self.pool.take(needed) if needed + len(self._running) <= self.pool.available else None
            if taken is None:
                self.pool.release(known)
                return
            request.pages, request.held = known + taken, len(known) * self._page
            if not request.answer.tokens:
                request.cached = request.held
                self.counts.prompt_tokens += len(request.asked.prompt)
                self.counts.cached_tokens += request.cached
            self._running.append(self._waiting.popleft())

    def _is_being_read(self, keys: list[bytes]) -> bool:
        """Whether somebody is about to fill the page that comes next, so that waiting is less work than reading."""
        return bool(keys) and any(
            keys[0] in request.keys for request in self._running if request.held < request.to_read
        )

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
        targets = None
        if request.wants_prompt_logprobs and not request.answer.tokens:
            following = request.asked.prompt[begin + 1 : end + 1]
            targets = np.zeros(tokens.shape, np.int32)
            targets[0, : len(following)] = following
        produced, scores, hidden = self._run_read(request, tokens, end - begin, targets)
        request.held = end
        if end // self._page > begin // self._page:
            for page, key in zip(request.pages[: end // self._page], request.keys, strict=False):
                self.pool.publish(page, key)
        if scores is not None:
            request.prompt_logprobs += _prompt_tokens(scores, min(end, len(request.asked.prompt) - 1) - begin, request)
        if end == request.to_read and not request.asked.limit:
            request.hidden, request.answer.finish_reason = np.asarray(hidden, np.float32), "length"
        # a token is chosen after every piece, so that one program reads them all
        is_first = end == request.to_read and not request.answer.tokens and request.asked.limit > 0
        return self._take([request], produced, [1]) if is_first else []

    def _decode(self) -> list[tuple[Request, str]]:
        ready = [request for request in self._running if request.held == request.to_read and not request.is_over]
        one_by_one = any(request.matcher or request.asked.sampling.needs_history for request in ready)
        # who still waits for its first token does not wait for many of others
        steps = 1 if one_by_one or self._unread() else self._steps
        drafts = {}
        if not one_by_one and len(ready) <= DRAFTING:
            drafts = {request: request.drafts.after(request.tokens) for request in ready}
        if is_drafted := any(drafts.values()):
            steps = 1 + DRAFTED
        ready = self._with_room(ready, steps)
        if not ready:
            return []
        if is_drafted:
            return self._verify(ready, [drafts[request] for request in ready])
        produced, count, seen = self._run_decode(ready, steps)
        self._sampled = None if one_by_one else (ready, seen)
        return self._take(ready, produced, [count] * len(ready))

    def _verify(self, ready: list[Request], drafts: list[list[int]]) -> list[tuple[Request, str]]:
        """Decodes as many tokens as drafts foresee, and one more."""
        produced = self._run_verify(ready, drafts)
        tokens = np.asarray(produced.tokens)
        counts = []
        for row, (request, draft) in enumerate(zip(ready, drafts, strict=True)):
            right = next((i for i, id in enumerate(draft) if tokens[row, i] != id), len(draft))
            if draft:
                request.drafts.learn(right)
            counts.append(right + 1)
        self.counts.drafted_tokens += sum(map(len, drafts))
        self.counts.accepted_tokens += sum(counts) - len(counts)
        self._sampled = None
        return self._take(ready, produced, counts)

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
                self.counts.preemptions += 1
                self._leave(youngest)
                self._waiting.appendleft(youngest)
            if taken is not None:
                request.pages += taken
                kept.append(request)
        return [request for request in kept if request in self._running]

    def _take(self, requests: list[Request], produced: Produced, counts: list[int]) -> list[tuple[Request, str]]:
        """Gives each request its new tokens, as many at most as `counts` says."""
        tokens, logprobs, top_tokens, top_logprobs = (
            np.asarray(x[:, : max(counts)]).tolist()
            for x in (produced.tokens, produced.logprobs, produced.top_tokens, produced.top_logprobs)
        )
        pieces = []
        for row, request in enumerate(requests):
            answer, shown = request.answer, ""
            first = not answer.tokens
            for i in range(counts[row]):
                if request.is_over:
                    break
                top = list(zip(top_tokens[row][i], top_logprobs[row][i], strict=True))[: request.num_top]
                try:
                    shown += answer.add(tokens[row][i], logprobs[row][i], top, request.text)
                    if request.matcher and not answer.finish_reason:
                        request.matcher.advance(tokens[row][i])
                except InputError as error:  # of this request alone
                    request.error = error
                    break
                self.counts.answer_tokens += 1
                # a token enters the cache when the next one is chosen
                request.held += 0 if first and i == 0 else 1
            if shown:
                pieces.append((request, shown))
        return pieces

    # --- the programs, and what they are given ------------------------------------------------------------------------

    def _run_read(
        self, request: Request, tokens: np.ndarray, count: int, targets: np.ndarray | None
    ) -> tuple[Produced, Scores | None, jax.Array]:
        cache = self._cache([request], 1)
        stop_ids = self._stop_ids([request])
        shape = ("read", tokens.size, cache.tables.shape, stop_ids.shape, targets is not None)
        with self.qwen.entered():
            cache, produced, scores, hidden = read(
                self.qwen.params,
                cache,
                tokens,
                np.int32(count),
                self._sampling([request]),
                stop_ids,
                targets,
                **self._static,
            )
        self._layers = cache.layers
        self.compiled.add(shape)
        return produced, scores, hidden

    def _run_decode(self, requests: list[Request], steps: int, rows: int = 1) -> tuple[Produced, int, SamplingRows]:
        """What up to `steps` steps give these requests, how many were taken, and what sampling has seen after them."""
        state, stop_ids = self._state(requests, rows)
        with self.qwen.entered():
            state, produced, count = decode(self.qwen.params, state, np.int32(steps), stop_ids, **self._static)
        assert isinstance(state.cache, PagedCache) and state.rows is not None
        self._layers = state.cache.layers
        self.compiled.add(("decode", state.cache.tables.shape, stop_ids.shape))
        return produced, int(count), state.rows

    def _run_verify(self, requests: list[Request], drafts: list[list[int]], rows: int = 1) -> Produced:
        state, stop_ids = self._state(requests, rows)
        told = np.zeros((state.tokens.size, DRAFTED), np.int32)
        for row, draft in enumerate(drafts):
            told[row, : len(draft)] = draft
        with self.qwen.entered():
            state, produced = verify(self.qwen.params, state, told, stop_ids, **self._static)
        assert isinstance(state.cache, PagedCache)
        self._layers = state.cache.layers
        self.compiled.add(("verify", state.cache.tables.shape, stop_ids.shape))
        return produced

    def _state(self, requests: list[Request], rows: int) -> tuple[DecodeState, np.ndarray]:
        """These requests, and as many more rows as it takes, as the programs see them, and their stop ids."""
        rows = max(bucket(max(len(requests), rows)), self.qwen.backend.min_decode_rows)
        text = AnswerText(self.qwen.tokenizer, (), frozenset(), 0)
        nobody = Request(Asked([0], Sampling(), 0, (), ()), 0, text, Answer(1))
        all_rows = requests + [nobody] * (rows - len(requests))
        seen = self._sampled[1] if self._sampled and self._sampled[0] == requests else None
        if seen is None or seen.seed.size != rows:
            seen = self._sampling(all_rows)
        state = DecodeState(
            cache=self._cache(all_rows, rows),
            tokens=jnp.array([request.tokens[-1] for request in all_rows], jnp.int32),
            steps=jnp.array([len(request.answer.tokens) for request in all_rows], jnp.int32),
            limits=jnp.array([request.asked.limit for request in all_rows], jnp.int32),
            done=jnp.arange(rows) >= len(requests),
            rows=seen,
        )
        return state, self._stop_ids(all_rows)

    @property
    def _static(self) -> dict[str, Any]:
        return {"config": self._config, "vocab_size": len(self.qwen.tokenizer), "num_top": TOP}

    def _cache(self, requests: list[Request], rows: int) -> PagedCache:
        """The pages as these rows see them, in tables that are long enough for the longest."""
        # on CPUs attention loops over the pages that rows hold, however long the tables are: one length for all
        longest = self.capacity // self._page + 1
        if self.qwen.backend.kernels != "cpu":
            longest = max(len(request.pages) for request in requests)
        width = bucket(longest, 4)
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
            masks=[request.matcher and request.matcher.allowed() for request in requests],
        )

    def _stop_ids(self, requests: list[Request]) -> np.ndarray:
        """[rows, n], filled up with what is no id."""
        width = bucket(max(len(request.asked.stop_ids) for request in requests), 16)
        return np.array(
            [[*ids, *[NO_ID] * (width - len(ids))] for ids in (x.asked.stop_ids for x in requests)], np.int32
        )


def _prompt_tokens(scores: Scores, count: int, request: Request) -> list[PromptToken]:
    logprobs, ids, top = (np.asarray(x[:count]).tolist() for x in scores)
    num_top = request.num_top
    return [
        PromptToken(logprob, list(zip(row[:num_top], values[:num_top], strict=True)))
        for logprob, row, values in zip(logprobs, ids, top, strict=True)
    ]
