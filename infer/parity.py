"""Our model against PyTorch's: the same weights and tokens through both, and how far apart they come out.

Errors of tensors are relative, ‖ours - PyTorch's‖ / ‖PyTorch's‖. PyTorch reads the weights with its own loader.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from infer import torch_reference
from infer.decode import MAX_STEPS, bucket, decode, pad_prompts, prefill
from infer.prepare import prepare
from infer.torch_reference import Trace
from qwen_jax.backend import Backend
from qwen_jax.config import ModelConfig
from qwen_jax.layers.moe import load_balancing_loss
from qwen_jax.model import Inputs, Params, forward, unembed
from qwen_jax.weights.load import get_leaf, load_params
from qwen_jax.weights.names import leaves
from qwen_jax.weights.open import open_checkpoint

# Limits of float32. They are not loosened to pass: where one does not hold, there is a cause.
# A float32 sum of n terms is off by about sqrt(n) * 6e-8; products of 1,000 to 5,000 terms, seven per layer, over 24
# layers and a softmax that sharpens differences, end near 1e-5.
HIDDEN_LIMIT = 2e-5
LOGITS_LIMIT = 2e-5
# Log-probabilities are differences of logits, of the same size.
LOGPROBS_LIMIT = 2e-5
# The loss is one number, a mean in which errors cancel.
LOSS_LIMIT = 1e-5
# A gradient passes every product twice, and a bias gradient sums terms that nearly cancel.
GRADIENT_LIMIT = 1e-4
# Ours in bfloat16 may not be worse than PyTorch in bfloat16; a tenth is for what the order of summation moves.
BFLOAT16_KL_RATIO = 1.1

# Tokens of each prompt that greedy decoding continues; equal, so that PyTorch needs no padding.
GREEDY_PROMPT_TOKENS = 96

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Measure:
    """One compared quantity: `value` is a tensor's relative error, or what the name says."""

    name: str
    value: float
    limit: float | None = None
    max_abs: float | None = None

    @property
    def holds(self) -> bool:
        return self.limit is None or self.value <= self.limit


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found of one model; `depth` holds relative errors from the embedding to the last layer."""

    model: str
    dtype: str
    num_tokens: int
    measures: list[Measure]
    depth: dict[str, list[float]]

    @property
    def holds(self) -> bool:
        return all(measure.holds for measure in self.measures)


def check(
    path: Path,
    prompts: Sequence[list[int]],
    *,
    name: str = "",
    num_tokens: int = 512,
    gradient_tokens: int = 256,
    greedy_tokens: int = 256,
    dtype: Literal["float32", "bfloat16"] = "float32",
    say: Say = lambda stage: None,
) -> Report:
    """Checks a model folder or GGUF file. The network reads the prompts' ids one after the other, `num_tokens` of them.

    float32: every stage of it, the loss and gradients of the first `gradient_tokens`, and `greedy_tokens` decoded after
    each prompt (0 leaves them out). bfloat16: the distance from PyTorch in float32, beside PyTorch's own in bfloat16.
    """
    tokens = np.resize([token for prompt in prompts for token in prompt], (1, num_tokens)).astype(np.int32)  # repeats
    if dtype == "bfloat16":
        measures, depth = _check_bfloat16(path, tokens, say)
    else:
        starts = np.stack([np.resize(prompt, GREEDY_PROMPT_TOKENS) for prompt in prompts]).astype(np.int32)
        with jax.default_matmul_precision("highest"):  # TPUs and GPUs would round float32 inputs
            measures, depth = _check_float32(path, tokens, tokens[:, :gradient_tokens], starts, greedy_tokens, say)
    return Report(name, dtype, num_tokens, measures, depth)


def _check_float32(
    path: Path, tokens: np.ndarray, graded: np.ndarray, starts: np.ndarray, greedy_tokens: int, say: Say
) -> tuple[list[Measure], dict[str, list[float]]]:
    say("PyTorch reads the weights")
    reference = torch_reference.load(path)
    say(f"PyTorch runs {tokens.shape[1]} tokens")
    expected = torch_reference.trace(reference, tokens)
    loss, gradients = math.nan, {}
    if graded.size:
        say(f"PyTorch's gradients of {graded.shape[1]} tokens")
        loss, gradients = torch_reference.loss_and_gradients(reference, graded)
    if greedy_tokens:
        say(f"PyTorch decodes {greedy_tokens} tokens after {len(starts)} prompts")
        continued = torch_reference.greedy(reference, starts, greedy_tokens)
    del reference
    gc.collect()

    say("JAX reads the weights")
    checkpoint = open_checkpoint(path)
    config, params = checkpoint.config, load_params(checkpoint, np.float32, progress=False)
    say(f"JAX runs {tokens.shape[1]} tokens")
    measures, depth = compare_traces(expected, trace(config, params, tokens), limits=True)
    if graded.size:
        say(f"JAX's gradients of {graded.shape[1]} tokens")
        measures += compare_gradients(config, (loss, gradients), loss_and_gradients(config, params, graded))
        gradients.clear()
    if greedy_tokens:
        say(f"JAX decodes {greedy_tokens} tokens after {len(starts)} prompts")
        params = prepare(params, Backend.of(params), donate=True)
        measures.append(compare_greedy(continued, greedy(config, params, starts.tolist(), greedy_tokens)))
    return measures, depth


def _check_bfloat16(path: Path, tokens: np.ndarray, say: Say) -> tuple[list[Measure], dict[str, list[float]]]:
    say("PyTorch reads the weights")
    reference = torch_reference.load(path)
    say(f"PyTorch runs {tokens.shape[1]} tokens in float32")
    exact = torch_reference.trace(reference, tokens)
    torch_reference.to_bfloat16(reference)
    say(f"PyTorch runs {tokens.shape[1]} tokens in bfloat16")
    rounded = torch_reference.trace(reference, tokens)
    del reference
    gc.collect()

    say("JAX reads the weights")
    checkpoint = open_checkpoint(path)
    # as it is served
    params = load_params(checkpoint, jnp.bfloat16, progress=False)
    params = prepare(params, Backend.of(params), donate=True)
    say(f"JAX runs {tokens.shape[1]} tokens in bfloat16")
    found = trace(checkpoint.config, params, tokens)
    theirs, their_depth = compare_traces(exact, rounded, label="PyTorch bfloat16")
    *ours, kl = (compared := compare_traces(exact, found, label="ours bfloat16"))[0]
    kl = dataclasses.replace(kl, limit=BFLOAT16_KL_RATIO * theirs[-1].value)
    return [*theirs, *ours, kl], their_depth | compared[1]


# --- Measures ---------------------------------------------------------------------------------------------------------


def tensor_error(name: str, expected: np.ndarray, found: np.ndarray, limit: float | None = None) -> Measure:
    """Relative and largest absolute error; 0 when both are zero everywhere."""
    difference = found - expected
    norm, size = _norm(difference), _norm(expected)
    relative = norm / size if size else (0.0 if norm == 0 else math.inf)
    return Measure(name, relative, limit, float(np.max(np.abs(difference), initial=0.0)))


def _norm(x: np.ndarray) -> float:
    scale = float(np.max(np.abs(x), initial=0.0))  # the squares of tiny gradients would be 0 in float32
    return scale * math.sqrt(float(np.sum(np.square(x / scale)))) if scale and math.isfinite(scale) else scale


def compare_traces(
    expected: Trace, found: Trace, *, limits: bool = False, label: str = "ours"
) -> tuple[list[Measure], dict[str, list[float]]]:
    """Errors of every stage, the KL divergence last; and the residual stream's by depth under `label`."""
    prefix = "" if label == "ours" else f"{label}: "

    def measure(name: str, a: np.ndarray, b: np.ndarray, limit: float) -> Measure:
        return tensor_error(prefix + name, a, b, limit if limits else None)

    names = ["embedding", *(f"layer {i}" for i in range(len(expected.layers) - 1))]
    layers = [measure(*row, HIDDEN_LIMIT) for row in zip(names, expected.layers, found.layers, strict=True)]
    hidden = measure("final norm", expected.hidden, found.hidden, HIDDEN_LIMIT)
    logits = measure("logits", expected.logits, found.logits, LOGITS_LIMIT)
    logprobs, kl = _compare_distributions(expected.logits, found.logits)
    logprobs = dataclasses.replace(logprobs, name=prefix + logprobs.name, limit=LOGPROBS_LIMIT if limits else None)
    divergence = Measure(f"KL({label} ‖ PyTorch float32), nats per token", kl)
    return [*layers, hidden, logits, logprobs, divergence], {label: [layer.value for layer in layers]}


def _compare_distributions(expected: np.ndarray, found: np.ndarray) -> tuple[Measure, float]:
    """Error of the log-probabilities, and the mean of KL(found ‖ expected); row by row, as vocabularies are wide."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max()
        return shifted - np.log(np.exp(shifted).sum())

    width = expected.shape[-1]
    error = size = largest = kl = 0.0
    for rows in zip(expected.reshape(-1, width), found.reshape(-1, width), strict=True):
        theirs, ours = map(log_softmax, rows)
        error += float(np.sum(np.square(ours - theirs)))
        size += float(np.sum(np.square(theirs)))
        largest = max(largest, float(np.max(np.abs(ours - theirs))))
        kl += float(np.sum(np.exp(ours) * (ours - theirs)))
    return Measure("log-probabilities", math.sqrt(error / size), None, largest), kl / (expected.size // width)


def compare_gradients(
    config: ModelConfig, expected: tuple[float, Mapping[str, np.ndarray]], found: tuple[float, Params]
) -> list[Measure]:
    """Error of the loss, and of the gradient of every tensor of a checkpoint, named by its place in our tree."""
    difference = abs(found[0] - expected[0])
    measures = [Measure("loss", difference / abs(expected[0]), LOSS_LIMIT, difference)]
    for leaf in leaves(config, "hf"):
        stacked = np.asarray(get_leaf(found[1], leaf.path))
        for index in leaf.indices():
            theirs = expected[1][leaf.tensor.format(*index)][leaf.first_row : leaf.first_row + leaf.rows]
            name = f"gradient {leaf.path}" + (str(list(index)) if index else "")
            measures.append(tensor_error(name, theirs, stacked[index].reshape(theirs.shape), GRADIENT_LIMIT))
    return measures


def compare_greedy(expected: np.ndarray, found: np.ndarray) -> Measure:
    """How many tokens [B, N] come after the first that differs, itself included; none may."""
    different = np.maximum.accumulate(expected != found, axis=1)
    rows, length = expected.shape
    return Measure(f"greedy: tokens that differ, of {rows} x {length}", float(different.sum()), 0.0)


# --- Our side ---------------------------------------------------------------------------------------------------------


def trace(config: ModelConfig, params: Params, tokens: np.ndarray, segment_ids: np.ndarray | None = None) -> Trace:
    """One forward pass over tokens [B, T]. segment_ids [B, T] tell documents apart, 0 is padding; default 1."""
    segment_ids = np.ones(tokens.shape, np.int32) if segment_ids is None else segment_ids.astype(np.int32)
    slots = np.arange(tokens.shape[1], dtype=np.int32)[None]
    begins = np.diff(segment_ids, axis=1, prepend=-1) != 0
    positions = slots - np.maximum.accumulate(np.where(begins, slots, 0), axis=1)
    values = _trace(config, params, *map(jnp.asarray, (tokens, positions, segment_ids)))
    return Trace(*(np.asarray(x, np.float32) for x in values))


@functools.partial(jax.jit, static_argnames="config")
def _trace(
    config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, ...]:
    lengths = jnp.sum(segment_ids != 0, axis=1)
    inputs = Inputs.inference(tokens, lengths=lengths, segment_ids=segment_ids, rotary_positions=positions)
    out = forward(config, params, inputs, return_layers=True)
    assert out.layers is not None
    return out.layers, out.hidden, unembed(config, params, out.hidden)


def loss_and_gradients(config: ModelConfig, params: Params, tokens: np.ndarray) -> tuple[float, Params]:
    """The training loss of tokens [B, T], with the load-balancing term of a mixture of experts, and its gradient."""
    loss, gradients = jax.jit(jax.value_and_grad(functools.partial(_loss, config)))(params, jnp.asarray(tokens))
    return float(loss), gradients


def _loss(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    out = forward(config, params, Inputs.training(tokens))
    logprobs = jax.nn.log_softmax(unembed(config, params, out.hidden[:, :-1]))
    loss = -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))
    if config.moe and out.router:
        loss += config.moe.aux_loss_coef * load_balancing_loss(out.router)
    return loss


def greedy(config: ModelConfig, params: Params, prompts: Sequence[Sequence[int]], num_tokens: int) -> np.ndarray:
    """[B, num_tokens]: the likeliest token again and again after each prompt, with the decoder that users run."""
    rows, length = len(prompts), max(map(len, prompts))
    tokens, lengths = pad_prompts([list(prompt) for prompt in prompts], rows, length)
    limits, never = jnp.full(rows, num_tokens, jnp.int32), jnp.asarray([-1], jnp.int32)
    fixed = {"config": config, "vocab_size": config.vocab_size, "num_top": 0}
    capacity = bucket(length + num_tokens)
    state, produced = prefill(
        params, jnp.asarray(tokens), jnp.asarray(lengths), limits, None, never, capacity=capacity, **fixed
    )
    chosen = [np.asarray(produced.tokens)]
    while sum(part.shape[1] for part in chosen) < num_tokens:
        state, produced, steps = decode(params, state, jnp.int32(MAX_STEPS), never, **fixed)
        chosen.append(np.asarray(produced.tokens)[:, : int(steps)])
    return np.concatenate(chosen, axis=1)
