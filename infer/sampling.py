"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, in transformers' order; seeds."""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.errors import InputError

# Enough sorted logits for nearly every nucleus; a row that needs more falls back to sorting the whole vocabulary.
CANDIDATES = 1024
NEGATIVE = jnp.finfo(jnp.float32).min


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
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0 and finite"),
            "top_k": (self.top_k >= 0, "at least 0 (0 is off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "positive and finite"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            "seed": (0 <= self.seed < 2**32, "in [0, 2^32)"),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise InputError(f"{name}={getattr(self, name)} is not possible; it must be {expected}.")

    @property
    def is_plain_greedy(self) -> bool:
        return self.temperature == 0 and self.repetition_penalty == 1 and self.presence_penalty == 0


class SamplingRows(flax.struct.PyTreeNode):
    """`Sampling` of a batch, one entry per row, and what the penalties have seen."""

    temperature: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    seed: jax.Array  # [B] uint32
    in_prompt: jax.Array  # [B, V] bool
    in_answer: jax.Array  # [B, V] bool

    @classmethod
    def create(cls, samplings: list[Sampling], prompts: list[list[int]], vocab_size: int) -> SamplingRows:
        """Rows for prompts of token ids; `vocab_size` is the number of logits V."""
        in_prompt = np.zeros((len(prompts), vocab_size), bool)
        for row, prompt in zip(in_prompt, prompts, strict=True):
            row[prompt] = True
        dtypes = {"top_k": np.int32, "seed": np.uint32}
        columns = {
            field.name: np.array([getattr(s, field.name) for s in samplings], dtypes.get(field.name, np.float32))
            for field in dataclasses.fields(Sampling)
        }
        columns |= {"in_prompt": in_prompt, "in_answer": np.zeros_like(in_prompt)}
        return cls(**jax.tree.map(jnp.asarray, columns))

    def record(self, tokens: jax.Array) -> SamplingRows:
        """The rows after `tokens` [B] have joined the answers."""
        return self.replace(in_answer=self.in_answer.at[jnp.arange(tokens.shape[0]), tokens].set(True))


def penalise(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Repetition and presence penalties on logits [B, V]."""
    repeated = rows.in_prompt | rows.in_answer
    penalty = rows.repetition_penalty[:, None]
    logits = jnp.where(repeated, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits - rows.presence_penalty[:, None] * rows.in_answer


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


def sample(logits: jax.Array, rows: SamplingRows, steps: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B], from float32 logits [B, V].

    Randomness depends on a row's seed and its own step [B] only, so neither the batch nor its padding changes a row.
    """
    logits = penalise(logits, rows)
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    kept = truncate(scaled, rows)

    def noise(seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), logits.shape[-1:])

    drawn = jnp.argmax(kept + jax.vmap(noise)(rows.seed, steps), axis=-1)
    return jnp.where(rows.temperature > 0, drawn, greedy).astype(jnp.int32)
