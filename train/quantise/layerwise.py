"""One layer after another: what its matrices meet in a model quantised so far, and what rounding does to them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer.evaluate_perplexity import token_nll
from qwen_jax.backend import Backend
from qwen_jax.config import ModelConfig
from qwen_jax.leaves import Int8, Observed
from qwen_jax.model import param_shardings
from qwen_jax.one_layer import embed_tokens, one_layer, run_layer
from qwen_jax.sharding import RULES, activation_sharding
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.load import flatten, get_leaf, load_layer, load_outside
from train.quantise.methods import Coded, Method, Seen, not_zero, squared_outputs
from train.quantise.stages import Layer, Matrices, Stage, stages

BATCH_TOKENS = 4096  # that pass a layer at a time
# What is done to a layer before a stage is rounded: the layer, what the stage then meets, and by what the outputs of
# its producer, which is rounded already, are divided.
Fold = Callable[[Matrices, Layer, Stage, list[Seen]], tuple[Layer, list[Seen], jax.Array | None]]


class KindError(NamedTuple):
    """Of one kind of matrix in all layers: |Q x - W x| / |W x|, both over all inputs x and layers."""

    kind: str  # "mlp/down"
    relative: float
    worst: float  # of a layer
    layer: int  # that one


class Loss(NamedTuple):
    """What quantising lost: by kind of matrix, and in the perplexity of `tokens` held-out tokens."""

    errors: list[KindError]
    before: float
    after: float
    tokens: int


class Quantiser:
    """Quantises a checkpoint layer by layer, and measures the loss.

    tokens and held_out: int32 [N, T] and [M, T]. method: of one matrix. fold: what is done before to the matrices of a
    stage. A mesh splits each layer as `model.param_shardings` says.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: Method,
        tokens: np.ndarray,
        held_out: np.ndarray,
        *,
        fold: Fold | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self._checkpoint, self._method, self._fold, self._mesh = checkpoint, method, fold, mesh
        self._tokens, self._held_out = tokens, held_out
        self._config = checkpoint.config
        self._shardings = param_shardings(self._config, mesh) if mesh is not None else None
        self._matrices, self._stages = Matrices(self._config), stages(self._config)
        self._sums: dict[str, list[tuple[float, float]]] = {}
        self._perplexities = (math.nan, math.nan)

    def loss(self) -> Loss:
        """That of all layers so far; perplexities when the last has come."""
        return Loss(list(self._errors()), *self._perplexities, tokens=self._held_out[:, 1:].size)

    def total(self) -> int:
        """Tokens that pass layers, each layer counted."""
        passes = len(self._stages) + 1
        return self._config.num_layers * (passes * self._tokens.size + 2 * self._held_out.size)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with Backend.of(self._mesh).entered(), nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            yield

    def layers(self, advance: Callable[[int], None] = lambda count: None) -> Iterator[dict[str, Any]]:
        """Of each layer its quantised matrices and its other leaves, by path, in numpy arrays."""
        with self._entered():
            outside = load_outside(self._checkpoint, self._shardings)
            run = functools.partial(_embedded, self._config, outside, self._mesh)
            inputs, before = run(self._tokens), run(self._held_out)
            outside = {
                name: tree for name, tree in outside.items() if self._config.tie_word_embeddings or name != "embed"
            }
        after = before
        for index in range(self._config.num_layers):
            with self._entered():
                one = one_layer(self._config, index)
                layer = load_layer(self._checkpoint, index, np.float32, self._shardings)
                before = [run_layer(layer, outside["final_norm"], x, config=one) for x in _counted(before, advance)]
                layer, coded = self._quantised(layer, one, inputs, advance)
                after = [run_layer(layer, outside["final_norm"], x, config=one) for x in _counted(after, advance)]
                inputs = [run_layer(layer, outside["final_norm"], x, config=one)[0] for x in _counted(inputs, advance)]
                if index == self._config.num_layers - 1:
                    self._perplexities = tuple(self._perplexity(outside, each) for each in (before, after))
                before, after = ([x for x, _ in each] for each in (before, after))
                made = {f"layers/{path}": jax.device_get(leaf) for path, leaf in flatten(layer)}
                made |= {f"layers/{path}": jax.device_get(weight) for path, weight in coded.items()}
            yield made

    def _quantised(
        self, layer: Layer, config: ModelConfig, inputs: list[jax.Array], advance: Callable[[int], None]
    ) -> tuple[Layer, dict[str, Coded]]:
        """The layer with each matrix as what stands for it, and that."""
        all_coded: dict[str, Coded] = {}
        for stage in self._stages:
            seen = self._seen(layer, config, stage, inputs, advance)
            if self._fold is not None:
                layer, seen, rows = self._fold(self._matrices, layer, stage, seen)
                if rows is not None:
                    assert stage.producer is not None
                    divided = _divided(all_coded[stage.producer], rows)
                    all_coded[stage.producer] = divided
                    layer = self._matrices.with_matrix(layer, stage.producer, divided.astype(jnp.float32).dense())
            for group, of_group in zip(stage.groups, seen, strict=True):
                for path in group:
                    matrix = self._matrices.get(layer, path)
                    coded, dense, error, norm = _rounded(matrix, of_group, method=self._method)
                    layer = self._matrices.with_matrix(layer, path, dense)
                    all_coded[path] = coded
                    self._sums.setdefault(path, []).append((float(error), float(norm)))
        return layer, all_coded

    def _seen(
        self, layer: Layer, config: ModelConfig, stage: Stage, inputs: list[jax.Array], advance: Callable[[int], None]
    ) -> list[Seen]:
        """What the first matrix of each group meets."""
        watched = tuple(group[0] for group in stage.groups)
        for path in watched:
            layer = self._matrices.observed(layer, path)
        sums: list[Seen] | None = None
        for x in _counted(inputs, advance):
            found = _observe(layer, x, config=config, watched=watched)
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        assert sums is not None
        return sums

    def _perplexity(self, outside: Mapping[str, Any], last: list[tuple[jax.Array, jax.Array]]) -> float:
        """Given what `run_layer` made of the last layer."""
        total, begin = 0.0, 0
        for _, hidden in last:
            targets = self._held_out[begin : begin + len(hidden), 1:]
            total += float(_nll(outside, hidden, targets, config=self._config))
            begin += len(hidden)
        return math.exp(min(total / self._held_out[:, 1:].size, 700.0))

    def _errors(self) -> Iterator[KindError]:
        for path, each in self._sums.items():
            ratios = [math.sqrt(max(error, 0) / norm) if norm else 0.0 for error, norm in each]
            errors, norms = zip(*each, strict=True)
            whole = math.sqrt(max(sum(errors), 0) / sum(norms)) if sum(norms) else 0.0
            worst = max(range(len(ratios)), key=ratios.__getitem__)
            yield KindError(path.removesuffix("/kernel"), whole, ratios[worst], worst)


def batch_rows(num_rows: int, length: int) -> int:
    """Rows that pass at a time: as many as divide their number, up to BATCH_TOKENS tokens."""
    most = max(1, BATCH_TOKENS // length)
    return max(rows for rows in range(1, min(most, num_rows) + 1) if num_rows % rows == 0)


def _counted(batches: list[jax.Array], advance: Callable[[int], None]) -> Iterator[jax.Array]:
    for x in batches:
        yield x
        advance(x.shape[0] * x.shape[1])


def _embedded(config: ModelConfig, outside: Any, mesh: Mesh | None, tokens: np.ndarray) -> list[jax.Array]:
    """float32 [rows, T, D] of the tokens, batch by batch."""
    rows = batch_rows(*tokens.shape)
    if mesh is not None:  # as many as the devices share
        shares = math.prod(mesh.shape[axis] for axis in RULES.batch)
        rows = math.gcd(shares, len(tokens)) if rows % shares else rows
    found = []
    for start in range(0, len(tokens), rows):
        batch: Any = tokens[start : start + rows]
        if mesh is not None:
            batch = jax.device_put(batch, activation_sharding(mesh, batch.shape, "batch", None))
        found.append(embed_tokens(outside, batch, config=config))
    return found


@functools.partial(jax.jit, static_argnames=("config", "watched"))
def _observe(layer: Layer, x: jax.Array, *, config: ModelConfig, watched: tuple[str, ...]) -> list[Seen]:
    scale = {"scale": jnp.ones(config.hidden_size)}

    def pass_through(layer: Layer) -> jax.Array:
        return jnp.sum(run_layer(layer, scale, x, config=config)[0])

    gradients = jax.grad(pass_through)(layer)
    found = []
    for path in watched:
        observed = get_leaf(gradients, path)
        assert isinstance(observed, Observed)
        found.append(Seen(observed.gram, observed.magnitude))
    return found


@functools.partial(jax.jit, static_argnames="method")
def _rounded(matrix: jax.Array, seen: Seen, *, method: Method) -> tuple[Coded, jax.Array, jax.Array, jax.Array]:
    """A matrix in few bits, what that stands for, and |Q x - W x|² and |W x|² summed over the inputs."""

    def one(each: tuple[jax.Array, Seen]) -> tuple[Coded, jax.Array, jax.Array, jax.Array]:
        weight, of_one = each
        coded = method(weight, of_one)
        dense = coded.astype(jnp.float32).dense()
        error, norm = (squared_outputs(x, of_one.gram) for x in (dense - weight, weight))
        return coded, dense, error, norm

    if matrix.ndim == 2:
        return one((matrix, seen))
    coded, dense, errors, norms = jax.lax.map(one, (matrix, seen))  # experts one after another
    return coded, dense, jnp.sum(errors), jnp.sum(norms)


def _divided(coded: Coded, rows: jax.Array) -> Coded:
    """A weight [*experts, out, in] whose outputs are divided by `rows` [*experts, out]."""
    rows = rows if isinstance(coded, Int8) else rows[..., None]
    return coded.replace(scale=not_zero((coded.scale.astype(jnp.float32) / rows).astype(coded.scale.dtype)))


@functools.partial(jax.jit, static_argnames="config")
def _nll(outside: Any, hidden: jax.Array, targets: jax.Array, *, config: ModelConfig) -> jax.Array:
    return jnp.sum(token_nll(config, outside, hidden[:, :-1], targets))
