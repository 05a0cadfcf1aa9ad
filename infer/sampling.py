"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, in transformers' order; seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.errors import InputError

# Enough sorted logits for nearly every nucleus; a row that needs more falls back to sorting the whole vocabulary.
CANDIDATES = 1024
# Entries of a row's logit bias; OpenAI's clients send a few, and one shape serves all.
MAX_BIASES = 320
NEGATIVE = jnp.finfo(jnp.float32).min
# Below it logits divided by the temperature could overflow; nothing but the likeliest token has a chance by then.
COLDEST = 1e-6
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a sequence is sampled. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and default penalties are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token in the prompt or the answer (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already in the answer (the OpenAI definition)."""
    frequency_penalty: float = 0.0
    """The same, times how often the answer has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these ids."""
    seed: int = 0
    min_tokens: int = 0
    """Tokens an answer has before a stop id may end it."""
    min_length: int = 0
    """The same for prompt and answer together."""
    suppress_tokens: tuple[int, ...] = ()
    """Ids that are never chosen."""
    allowed_tokens: tuple[int, ...] = ()
    """Where not empty, the only ids that are chosen."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Ids that are not chosen first."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids of which none is ever completed."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens appears twice in prompt and answer; 0 is off."""

    def __post_init__(self) -> None:
        largest = float(jnp.finfo(jnp.float32).max)  # what the device computes with
        ranges = {
            "temperature": (0, largest, "at least 0 and finite"),
            "top_p": (1e-30, 1, "in (0, 1]"),
            "min_p": (0, 1, "in [0, 1]"),
            "repetition_penalty": (1e-30, 1e30, "positive and finite"),
            "presence_penalty": (-2, 2, "in [-2, 2]"),
            "frequency_penalty": (-2, 2, "in [-2, 2]"),
            "seed": (0, 2**32 - 1, "in [0, 2^32)"),
        }
        ranges |= {
            name: (0, 2**31 - 1, "at least 0 (0 is off) and below 2^31")
            for name in ("top_k", "min_tokens", "min_length", "no_repeat_ngram_size")
        }
        for name, (least, most, expected) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name}={getattr(self, name)} is not possible; it must be {expected}.")
        if len(self.logit_bias) > MAX_BIASES or not all(-100 <= bias <= 100 for _, bias in self.logit_bias):
            raise InputError(f"logit_bias is not possible; give at most {MAX_BIASES} ids, with values in [-100, 100].")

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token of the model's own distribution is taken."""
        plain = Sampling(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=self.seed)
        return dataclasses.replace(self, temperature=0.0 if self.temperature < COLDEST else 1.0, min_length=0) == plain

    @property
    def needs_history(self) -> bool:
        """Whether what is banned next depends on the tokens before."""
        return self.no_repeat_ngram_size > 0 or any(len(word) > 1 for word in self.bad_words_ids)

    def banned_after(self, tokens: Sequence[int]) -> set[int]:
        """The ids that complete a bad word or repeat an n-gram after `tokens`, prompt and answer."""
        tokens, size = tuple(tokens), self.no_repeat_ngram_size
        banned = {word[-1] for word in self.bad_words_ids if tokens[len(tokens) - len(word) + 1 :] == word[:-1]}
        if 0 < size <= len(tokens):
            last = tokens[len(tokens) - size + 1 :]
            starts = range(len(tokens) - size + 1)
            banned |= {tokens[i + size - 1] for i in starts if tokens[i : i + size - 1] == last}
        return banned


class SamplingRows(flax.struct.PyTreeNode):
    """`Sampling` of a batch, one entry per row, and what the penalties have seen."""

    temperature: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array  # [B] uint32
    min_tokens: jax.Array  # [B] int32
    plain: jax.Array  # [B] bool, the likeliest token of the model's own distribution is taken
    report: jax.Array  # [B] bool, the likeliest tokens are reported
    in_prompt: jax.Array  # [B, V] bool
    counts: jax.Array  # [B, V] int32, how often the answer has a token
    allowed: jax.Array  # [B, ceil(V / 32)] uint32, bit i of word w: whether token 32 w + i may come next
    allowed_first: jax.Array  # the same for the first token of the answer
    bias_ids: jax.Array  # [B, MAX_BIASES] int32, V where there is none
    biases: jax.Array  # [B, MAX_BIASES] float32

    @classmethod
    def create(
        cls,
        samplings: list[Sampling],
        prompts: list[list[int]],
        vocab_size: int,
        *,
        report: bool = False,
        answers: list[list[int]] | None = None,
        masks: Sequence[np.ndarray | None] = (),
    ) -> SamplingRows:
        """Rows for prompts of token ids, and what has been answered; `vocab_size` is the number of logits V.

        masks: of each row, what may come next besides, as bits of uint32 words, of which missing ones are 0.
        """
        answers = answers or [[] for _ in prompts]
        shape = (len(prompts), vocab_size)
        columns: dict[str, np.ndarray] = {
            "in_prompt": np.zeros(shape, bool),
            "counts": np.zeros(shape, np.int32),
            "bias_ids": np.full((len(prompts), MAX_BIASES), vocab_size, np.int32),
            "biases": np.zeros((len(prompts), MAX_BIASES), np.float32),
        }
        for row, (prompt, answer, s) in enumerate(zip(prompts, answers, samplings, strict=True)):
            columns["in_prompt"][row, prompt] = True
            np.add.at(columns["counts"][row], answer, 1)
            for i, (id, bias) in enumerate(s.logit_bias):
                columns["bias_ids"][row, i], columns["biases"][row, i] = id, bias
        allowed = [allowed_next(s, p + a, vocab_size) for s, p, a in zip(samplings, prompts, answers, strict=True)]
        first = [_without(set(s.begin_suppress_tokens), vocab_size) for s in samplings]
        columns |= {"allowed": np.stack(allowed), "allowed_first": np.stack(first)}
        masked = np.zeros(len(prompts), bool)
        for row, mask in enumerate(masks):
            if mask is not None:
                columns["allowed"][row, : len(mask)] &= mask
                columns["allowed"][row, len(mask) :] = 0
                masked[row] = True
        dtypes = {"top_k": np.int32, "seed": np.uint32}
        for name in (*_FLOATS, *dtypes):
            columns[name] = np.array([getattr(s, name) for s in samplings], dtypes.get(name, np.float32))
        columns["temperature"][columns["temperature"] < COLDEST] = 0
        least = [max(s.min_tokens, s.min_length - len(p)) for s, p in zip(samplings, prompts, strict=True)]
        columns["min_tokens"] = np.maximum(np.array(least, np.int64), 0).astype(np.int32)
        columns["plain"] = np.array([s.is_plain for s in samplings]) & (columns["min_tokens"] == 0) & ~masked
        columns["report"] = np.full(len(prompts), report)
        return cls(**jax.tree.map(jnp.asarray, columns))

    def record(self, tokens: jax.Array) -> SamplingRows:
        """The rows after `tokens` [B] have joined the answers."""
        return self.replace(counts=self.counts.at[jnp.arange(tokens.shape[0]), tokens].add(1))


def allowed_next(sampling: Sampling, tokens: list[int], vocab_size: int) -> np.ndarray:
    """Which of the V tokens may follow `tokens`, as bits of uint32 [ceil(V / 32)]."""
    words = _without({*sampling.suppress_tokens, *sampling.banned_after(tokens)}, vocab_size)
    if sampling.allowed_tokens:
        words &= ~_without(set(sampling.allowed_tokens), vocab_size)
    return words


def _without(ids: set[int], vocab_size: int) -> np.ndarray:
    """Bits of uint32 [ceil(V / 32)], every one set but those of `ids`."""
    words = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
    inside = np.array([id for id in ids if 0 <= id < vocab_size], np.int64)
    np.bitwise_and.at(words, inside // 32, ~(np.uint32(1) << (inside % 32).astype(np.uint32)))
    return words


def penalise(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Repetition, presence and frequency penalties on logits [B, V], and their bias."""
    repeated = rows.in_prompt | (rows.counts > 0)
    penalty = rows.repetition_penalty[:, None]
    logits = jnp.where(repeated, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits -= rows.presence_penalty[:, None] * (rows.counts > 0) + rows.frequency_penalty[:, None] * rows.counts
    return jax.vmap(lambda row, ids, biases: row.at[ids].add(biases, mode="drop"))(logits, rows.bias_ids, rows.biases)


def truncate(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Removes what top-k, top-p and min-p exclude from logits [B, V], setting it to the lowest float.

    top-p keeps the fewest most likely tokens whose probability (after top-k) reaches p; ties at a boundary stay.
    """
    vocab_size = logits.shape[-1]
    top_k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab_size), vocab_size)
    # a float32 sum can reach 1 before its last terms, which nothing excludes when top-p is off
    top_p = jnp.where(rows.top_p < 1, rows.top_p, jnp.inf)
    log_total = jax.nn.logsumexp(logits, axis=-1)

    def boundary(count: int) -> tuple[jax.Array, jax.Array]:
        """The lowest logit kept, from the `count` largest, and whether that was enough to know it."""
        largest = lax.top_k(logits, count)[0]  # [B, count], descending
        inside = jnp.arange(count)[None] < top_k[:, None]
        log_kept = jax.nn.logsumexp(jnp.where(inside, largest, -jnp.inf), axis=-1)
        # without top-k the total is what is kept; a top-k beyond `count` needs the longer list
        log_kept = jnp.where(top_k < vocab_size, log_kept, log_total)
        probs = jnp.where(inside, jnp.exp(largest - log_kept[:, None]), 0)
        before = jnp.cumsum(probs, axis=-1) - probs
        keep = inside & (before < top_p[:, None])
        lowest = jnp.min(jnp.where(keep, largest, jnp.inf), axis=-1)
        known = (top_k <= count) | ((top_k == vocab_size) & (before[:, -1] + probs[:, -1] >= top_p))
        return lowest, known

    off = (rows.top_k <= 0) & (rows.top_p >= 1)
    count = min(CANDIDATES, vocab_size)
    lowest, known = boundary(count)
    lowest = lax.cond(jnp.all(known | off), lambda: lowest, lambda: boundary(vocab_size)[0])
    lowest = jnp.where(off, -jnp.inf, lowest)
    best = jnp.max(logits, axis=-1)
    lowest = jnp.maximum(lowest, best + jnp.log(rows.min_p))
    return jnp.where(logits >= lowest[:, None], logits, NEGATIVE)


def ban(logits: jax.Array, rows: SamplingRows, steps: jax.Array, stop_ids: jax.Array) -> jax.Array:
    """Logits [B, V] without the tokens that may not come at a row's step [B]; `stop_ids` beyond V are none.

    stop_ids: of all rows [n], or of each [B, n].
    """
    nothing = jnp.zeros(logits.shape[-1], bool)
    ends = jax.vmap(lambda ids: nothing.at[ids].set(True, mode="drop"))(jnp.atleast_2d(stop_ids))
    too_early = (steps < rows.min_tokens)[:, None] & ends
    words = jnp.where((steps == 0)[:, None], rows.allowed & rows.allowed_first, rows.allowed)
    allowed = ((words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1).reshape(len(words), -1)
    return jnp.where((allowed[:, : logits.shape[-1]] == 0) | too_early, -jnp.inf, logits)


def sample(logits: jax.Array, rows: SamplingRows, steps: jax.Array, stop_ids: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B], from float32 logits [B, V].

    Randomness depends on a row's seed and its own step [B] only, so neither the batch nor its padding changes a row.
    """
    logits = ban(penalise(logits, rows), rows, steps, stop_ids)
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    kept = truncate(scaled, rows)

    def noise(seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), logits.shape[-1:])

    drawn = jnp.argmax(kept + jax.vmap(noise)(rows.seed, steps), axis=-1)
    return jnp.where(rows.temperature > 0, drawn, greedy).astype(jnp.int32)
