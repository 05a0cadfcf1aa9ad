"""Every Qwen on one page: tokens -> hidden states -> logits.

Pure functions over one parameter tree, a nested dict. `params["layers"]` holds all layers stacked on a leading axis
(scanned), or each apart, with buffers of its own for an unrolled loop (`unstack`).

Letters: B batch, T query length, S key length, L layers, D model width, F feed-forward width, H query heads,
K key/value heads, h head width, V vocabulary rows, E experts.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qwen_jax import unstacked
from qwen_jax.cache import Cache
from qwen_jax.config import DynamicNtkScaling, ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels.spec import AttentionSpec
from qwen_jax.layers.attention import Attention, Context, take_token
from qwen_jax.layers.embedding import Embedding
from qwen_jax.layers.linear import residual_std
from qwen_jax.layers.mlp import Mlp
from qwen_jax.layers.moe import Moe, RouterStats
from qwen_jax.layers.norm import RMSNorm
from qwen_jax.layers.rope import rotary_tables
from qwen_jax.layers.sparse import sparse_budgets
from qwen_jax.remat import rematerialised
from qwen_jax.sharding import check_divides, constrain, shardings
from qwen_jax.unstacked import Unstacked

Params = dict[str, Any]


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array | int, only: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None, RouterStats | None]:
        c, std = self.config, self.config.initializer_range
        norm = RMSNorm(c.rms_norm_eps, "norm", name="attention_norm")
        y, cache = Attention(c, name="attention")(norm(x), context, cache, layer, only)
        x, is_token = take_token((x, context.is_token), only)
        x = constrain(x + y, "batch", "residual", None)
        normed = RMSNorm(c.rms_norm_eps, "norm", name="mlp_norm")(x)
        if c.moe:
            y, router = Moe(c.moe, c.hidden_size, std, name="moe")(normed, is_token)
        else:
            down_std = residual_std(std, c.num_layers) if c.model_type == "qwen" else std
            y, router = Mlp(c.hidden_size, c.intermediate_size, std, down_std, name="mlp")(normed), None
        return constrain(x + y, "batch", "residual", None), cache, router


class Inputs(flax.struct.PyTreeNode):
    """What one pass reads. Made by `training` or by `inference`, between which there is no default.

    Sequences longer than the model was trained on are turned differently at inference: Qwen1's dynamic NTK and LogN,
    and the length scaling of Dual Chunk Attention. What scores a model's answers does as what produced them.
    """

    tokens: jax.Array  # [B, T] int32, or embeddings [B, T, D] in their place
    lengths: jax.Array | None  # [B] int32, true lengths of the prompts at inference; None in training
    segment_ids: jax.Array | None = None  # [B, T] int32: a token sees its own segment only, 0 is padding
    rotary_positions: jax.Array | None = None  # [B, T] int32; None: the places in the row
    start: jax.Array | int | None = None  # place of the first token in its row, one or [B]; None: after the cache's

    @classmethod
    def training(
        cls, tokens: jax.Array, *, segment_ids: jax.Array | None = None, rotary_positions: jax.Array | None = None
    ) -> Inputs:
        """Rows as they are trained on; without `segment_ids` padding must stand on the right."""
        return cls(tokens, None, segment_ids, rotary_positions)

    @classmethod
    def inference(
        cls,
        tokens: jax.Array,
        *,
        lengths: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        rotary_positions: jax.Array | None = None,
        start: jax.Array | int | None = None,
    ) -> Inputs:
        """Rows as the decoder reads them, of prompts of `lengths` [B] (default: T). A cache carries its own lengths.

        start: with a cache, which holds nothing where it is 0; default `cache.lengths`.
        """
        lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32) if lengths is None else lengths
        return cls(tokens, lengths, segment_ids, rotary_positions, start)


class Output(flax.struct.PyTreeNode):
    """What `forward` computes. Optional parts are None unless asked for."""

    hidden: jax.Array  # [B, T, D] after the final norm
    cache: Any = None  # a Cache
    layers: jax.Array | None = None  # [L + 1, B, T, D]: the embedding, then the residual stream after each layer
    router: RouterStats | None = None  # leading L axis


def _embedding(config: ModelConfig) -> Embedding:
    return Embedding(config.vocab_size, config.hidden_size, config.initializer_range)


def _boxed_init(config: ModelConfig, key: jax.Array) -> Params:
    """Initial float32 parameters, each in a box that names its logical axes."""
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.hidden_size))
    index = jnp.zeros((1, 1), jnp.int32)
    context = Context(rotary_tables(config, index), AttentionSpec())

    def init_layer(layer_key: jax.Array) -> Any:
        return Block(config).init(layer_key, x, context, None, 0)["params"]

    layers = jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers))
    layers = nn.meta.add_axis(layers, 0, {nn.PARTITION_NAME: "layers"})
    params = {
        "embed": _embedding(config).init(embed_key, index)["params"],
        "layers": layers,
        "final_norm": RMSNorm(config.rms_norm_eps, "norm").init(key, x)["params"],
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = _embedding(config).init(head_key, index)["params"]
    return params


def init(config: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters as the reports state: N(0, 0.02), norms 1, biases 0."""
    params = nn.meta.unbox(_boxed_init(config, key))
    return jax.tree.map(lambda p: p.astype(dtype), params)


def abstract(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """The parameter tree as jax.ShapeDtypeStruct leaves; nothing is computed."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), nn.meta.unbox(_boxed_shapes(config)))


def logical_axes(config: ModelConfig) -> Params:
    """The parameter tree with a PartitionSpec of logical axis names in place of each leaf."""
    return nn.get_partition_spec(_boxed_shapes(config))


@functools.cache
def _boxed_shapes(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda key: _boxed_init(config, key), jax.random.key(0))


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The parameter tree with each leaf's NamedSharding on `mesh`. Raises InputError if the model does not divide."""
    check_divides(config, dict(mesh.shape))
    return shardings(logical_axes(config), abstract(config), mesh)


def unstack(params: Params, *, donate: bool = False) -> Params:
    """The same parameters with every layer apart, for an unrolled decode loop; donate: see `unstacked.unstack`."""
    return params | {"layers": unstacked.unstack(params["layers"], donate=donate)}


def forward(
    config: ModelConfig,
    params: Params,
    inputs: Inputs | jax.Array,
    *,
    cache: Cache | None = None,
    only: jax.Array | None = None,
    sparse: bool = False,
    return_layers: bool = False,
    dtype: DTypeLike | None = None,
    remat: str = "none",
) -> Output:
    """Runs the network.

    inputs: `Inputs`; tokens [B, T] alone are enough for a model that reads alike in training and at inference. cache:
    earlier keys and values, returned with the new ones (its `lengths` unchanged). only [B] int32, without
    return_layers: the index of the one token in each row whose hidden state is wanted, as [B, 1, D]; an unrolled last
    layer computes no more. sparse: with a cache, prompts above its threshold read only what `config.sparse_prefill`
    lets each head read, chosen by their last tokens that are no padding. return_layers: return the residual stream
    after each layer. dtype: of the activations; default the embedding's. remat: what gradients recompute, see
    `remat.kept`. Raises InputError for inputs that a cache cannot hold, and for tokens alone where that leaves open
    what is meant.
    """
    inputs = inputs if isinstance(inputs, Inputs) else _of_tokens(config, inputs)
    x = embed(config, params, inputs, dtype)
    context = _context(config, inputs, cache, sparse)
    x, cache, layers, router = _layers(config, params["layers"], x, context, cache, only, return_layers, remat)
    hidden: Any = RMSNorm(config.rms_norm_eps, "norm").apply({"params": params["final_norm"]}, x)
    return Output(hidden, cache, layers, router)


def _of_tokens(config: ModelConfig, tokens: jax.Array) -> Inputs:
    if isinstance(config.rope_scaling, DynamicNtkScaling) or config.logn_trained_length or config.dual_chunk:
        raise InputError(
            "this model reads long sequences differently in training and at inference; give forward "
            "Inputs.training(tokens) or Inputs.inference(tokens)."
        )
    return Inputs.inference(tokens)


def embed(config: ModelConfig, params: Params, inputs: Inputs, dtype: DTypeLike | None = None) -> jax.Array:
    """[B, T, D] of the tokens in `dtype`, default the table's."""
    dtype = dtype or params["embed"]["embedding"].dtype
    if inputs.tokens.ndim == 3:
        return inputs.tokens.astype(dtype)
    x: Any = _embedding(config).apply({"params": params["embed"]}, inputs.tokens, dtype)
    return x


def _context(config: ModelConfig, inputs: Inputs, cache: Cache | None, sparse: bool) -> Context:
    """What the layers are told: each row's places, rotary positions and chunks, three different things."""
    (batch, num_tokens), start = inputs.tokens.shape[:2], inputs.start
    longest, lengths = num_tokens, inputs.lengths
    if cache is None:
        if start is not None:
            raise InputError("without a cache a row begins with its first token; leave `start` out.")
        start = 0
    else:
        if inputs.segment_ids is not None or lengths is None:
            raise InputError(
                "a cache holds rows of one document each, read as at inference; leave `segment_ids` out, pad on the "
                "right and use Inputs.inference."
            )
        longest, lengths = cache.capacity, cache.prompt_lengths
        start = cache.lengths if start is None else start
    # a sequence that fits in one chunk needs no Dual Chunk Attention: it would be plain attention
    chunk = config.dual_chunk.chunk_length if config.dual_chunk else longest
    chunk, chunks = (chunk if chunk < longest else None), None
    positions = inputs.rotary_positions
    if positions is None:
        places = jnp.asarray(start, jnp.int32).reshape(-1, 1) + jnp.arange(num_tokens, dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(places, (batch, num_tokens))
    elif chunk and cache is not None:
        raise InputError("Dual Chunk Attention over a cache counts chunks by place; leave `rotary_positions` out.")
    elif chunk:
        chunks = positions // chunk
    segments = inputs.segment_ids
    spec = AttentionSpec(start, 0, segments, segments, chunk_length=chunk, query_chunks=chunks, key_chunks=chunks)
    budget = None
    if sparse and config.sparse_prefill and cache is not None and num_tokens > 1:
        budget = sparse_budgets(config.sparse_prefill, cache.prompt_lengths, start, num_tokens)
    rotary = rotary_tables(config, positions, lengths, dual_chunk=chunk is not None, sparse=budget is not None)
    return Context(rotary, spec, None if segments is None else segments != 0, budget)


def _layers(
    config: ModelConfig,
    layers: Any,
    x: jax.Array,
    context: Context,
    cache: Cache | None,
    only: jax.Array | None,
    return_layers: bool,
    remat: str,
) -> tuple[jax.Array, Cache | None, jax.Array | None, RouterStats | None]:
    """The residual stream through all layers, one after the other or scanned; the cache, x after each, the routers'."""
    block, windows = Block(config), config.layer_windows()

    def run(layer_params: Params, x: jax.Array, cache: Cache | None, layer: Any, window: Any, only: Any = None) -> Any:
        return block.apply({"params": layer_params}, x, context.of_layer(layer, window), cache, layer, only)

    if isinstance(layers, Unstacked):
        residuals, routers = [x], []
        for i, layer_params in enumerate(layers):
            last = only if i == len(layers) - 1 else None
            # what else a layer is told is no array that has a gradient
            one = rematerialised(functools.partial(run, layer=i, window=windows[i], only=last), remat)
            x, cache, router = one(layer_params, checkpoint_name(x, "residual"), cache)
            residuals, routers = [*residuals, x], [*routers, router]
        router = jax.tree.map(lambda *each: jnp.stack(each), *routers)
        return x, cache, jnp.stack(residuals) if return_layers else None, router

    # of differing layers, those without a window get one that holds every place
    window = None if len(set(windows)) == 1 else jnp.asarray([w or 2**30 for w in windows])

    def scanned(carry: Any, per_layer: Any) -> tuple[Any, Any]:
        x, cache = carry
        x = checkpoint_name(x, "residual")
        layer_params, layer, window = per_layer
        x, cache, router = run(layer_params, x, cache, layer, windows[0] if window is None else window)
        return (x, cache), (router, x if return_layers else None)

    embedding, per_layer = x, (layers, jnp.arange(config.num_layers), window)
    (x, cache), (router, after) = lax.scan(rematerialised(scanned, remat), (x, cache), per_layer)
    residuals = jnp.concatenate([embedding[None], after]) if return_layers else None
    return take_token(x, only), cache, residuals, router


def unembed(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D]; give it only the positions whose logits are needed."""
    head = params["embed"] if config.tie_word_embeddings else params["lm_head"]
    logits: Any = _embedding(config).apply({"params": head}, hidden, method="logits")
    return constrain(logits, "batch", *["sequence"] * (logits.ndim - 2), "vocab")
