"""Every Qwen on one page: tokens -> hidden states -> logits.

Pure functions over one parameter tree, a nested dict. `params["layers"]` holds all layers stacked on a leading axis
(scanned), or, where every layer shall be its own buffers and the loop unrolled (`unstack`), a tuple of L trees.

Letters: B batch, T query length, S key length, L layers, D model width, F feed-forward width, H query heads,
K key/value heads, h head width, V vocabulary rows, E experts.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qwen_jax.cache import Cache
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.layers.attention import Attention, AttentionSpec, take_token
from qwen_jax.layers.embedding import Embedding
from qwen_jax.layers.linear import residual_std
from qwen_jax.layers.mlp import Mlp
from qwen_jax.layers.moe import Moe, RouterStats
from qwen_jax.layers.norm import RMSNorm
from qwen_jax.layers.rope import Rotary, rotary_tables
from qwen_jax.layers.sparse import sparse_budgets
from qwen_jax.sharding import check_divides, constrain, shardings

Params = dict[str, Any]

# What of each layer the backward pass finds again instead of recomputing it, from most memory to least: everything;
# the projections and the attention's output; the projections; nothing but the layer's input; and that in host memory.
Remat = Literal["none", "minimal", "dots", "full", "offload"]


def rematerialised(function: Any, remat: Remat) -> Any:
    """`function` under a named rematerialisation policy. Raises InputError for a name that there is not."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return function
        case "minimal":
            policy = policies.save_only_these_names("projection", "attention")
        case "dots":
            policy = policies.save_only_these_names("projection")
        case "full":
            policy = policies.nothing_saveable
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["residual"],
                offload_src="device",
                offload_dst="pinned_host",
            )
        case _:
            raise InputError(
                f"there is no rematerialisation policy {remat!r}; use one of {', '.join(get_args(Remat))}."
            )
    # a layer in a scan is not merged with its own recomputation anyway
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotary: Rotary,
        spec: AttentionSpec,
        is_token: jax.Array | None,
        cache: Cache | None,
        layer: jax.Array | int,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], Cache | None, RouterStats | None]:
        c, std = self.config, self.config.initializer_range
        norm = RMSNorm(c.rms_norm_eps, "norm", name="attention_norm")
        y, kv, cache = Attention(c, name="attention")(norm(x), rotary, spec, cache, layer, only)
        x, is_token = take_token((x, is_token), only)
        x = constrain(x + y, "batch", "residual", None)
        normed = RMSNorm(c.rms_norm_eps, "norm", name="mlp_norm")(x)
        if c.moe:
            y, router = Moe(c.moe, c.hidden_size, std, name="moe")(normed, is_token)
        else:
            down_std = residual_std(std, c.num_layers) if c.model_type == "qwen" else std
            y, router = Mlp(c.hidden_size, c.intermediate_size, std, down_std, name="mlp")(normed), None
        return constrain(x + y, "batch", "residual", None), kv, cache, router


class Output(flax.struct.PyTreeNode):
    """What `forward` computes. Optional parts are None unless asked for."""

    hidden: jax.Array  # [B, T, D] after the final norm
    cache: Any = None  # Cache
    kv: Any = None  # new keys and values of all layers, stacked [L, B, K, T, h] or tuples of L
    layers: jax.Array | None = None  # [L + 1, B, T, D]: the embedding, then the residual stream after each layer
    router: RouterStats | None = None  # leading L axis


def _embedding(config: ModelConfig) -> Embedding:
    return Embedding(config.vocab_size, config.hidden_size, config.initializer_range)


def _boxed_init(config: ModelConfig, key: jax.Array) -> Params:
    """Initial float32 parameters, each in a box that names its logical axes."""
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.hidden_size))
    index = jnp.zeros((1, 1), jnp.int32)
    rotary = rotary_tables(config, index)
    spec = AttentionSpec(index, index)

    def init_layer(layer_key: jax.Array) -> Any:
        return Block(config).init(layer_key, x, rotary, spec, None, None, 0)["params"]

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
    return jax.eval_shape(lambda key: init(config, key, dtype), jax.random.key(0))


def logical_axes(config: ModelConfig) -> Params:
    """The parameter tree with a PartitionSpec of logical axis names in place of each leaf."""
    return nn.get_partition_spec(jax.eval_shape(lambda key: _boxed_init(config, key), jax.random.key(0)))


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The parameter tree with each leaf's NamedSharding on `mesh`. Raises InputError if the model does not divide."""
    check_divides(config, dict(mesh.shape))
    return shardings(logical_axes(config), abstract(config), mesh)


def unstack(params: Params, *, donate: bool = False) -> Params:
    """The same parameters with every layer in its own buffers, for an unrolled decode loop.

    donate: frees the stacked layers one leaf at a time, so that at most one leaf exists twice.
    """
    if isinstance(params["layers"], tuple):
        return params
    flat, treedef = jax.tree.flatten(params["layers"])
    split = []
    for stacked in flat:
        split.append([stacked[i] for i in range(stacked.shape[0])])
        if donate:
            stacked.delete()
    layers = tuple(treedef.unflatten([leaf[i] for leaf in split]) for i in range(len(split[0])))
    return params | {"layers": layers}


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    inference_lengths: jax.Array | None = None,
    keep_kv: bool = False,
    return_layers: bool = False,
    only: jax.Array | None = None,
    sparse: bool = False,
    dtype: DTypeLike | None = None,
    remat: Remat = "none",
) -> Output:
    """Runs the network on tokens [B, T] int32.

    positions [B, T] int32, below T or the cache's capacity: default 0..T-1, or the slots after `cache.lengths`.
    segment_ids [B, T] int32: a token sees its own segment only, 0 is padding; without them padding must stand on the
    right. cache: earlier keys and values, returned with the new ones (its `lengths` unchanged). inference_lengths [B]
    int32: true sequence lengths, which switch on what is done at inference only (see `rotary_tables`); a cache carries
    its own. keep_kv: return the new keys and values. return_layers: return the residual stream after each layer. only
    [B] int32, without return_layers: the index of the one token in each row whose hidden state is wanted, as [B, 1, D];
    an unrolled last layer computes no more. sparse: with a cache, read only what `config.sparse_prefill` lets each head
    read, chosen by the last tokens that are no padding. dtype: of the activations; default the embedding's. remat: what
    gradients recompute.
    """
    num_tokens = tokens.shape[1]
    longest = num_tokens if cache is None else cache.capacity
    # a sequence that fits in one chunk needs no Dual Chunk Attention: it would be plain attention
    chunk_length = config.dual_chunk.chunk_length if config.dual_chunk else longest
    chunk_length = chunk_length if chunk_length < longest else None
    offset = 0 if cache is None else cache.lengths if positions is None else None
    if positions is None:
        start = cache.lengths[:, None] if cache is not None else jnp.zeros((1, 1), jnp.int32)
        positions = jnp.broadcast_to(start + jnp.arange(num_tokens)[None], tokens.shape)
    lengths = cache.prompt_lengths if cache is not None else inference_lengths
    key_positions = positions if cache is None else jnp.arange(cache.capacity)[None]
    key_segments = segment_ids if cache is None else None
    spec = AttentionSpec(
        positions,
        key_positions,
        segment_ids,
        key_segments,
        offset=offset,
        chunk_length=chunk_length,
    )
    rotary = rotary_tables(config, positions, lengths, dual_chunk=chunk_length is not None, sparse=sparse)
    budgets = None
    if sparse and cache is not None and config.sparse_prefill:
        budgets = sparse_budgets(config.sparse_prefill, cache.prompt_lengths, positions)
    is_token = None if segment_ids is None else segment_ids != 0
    block, windows = Block(config), config.layer_windows()

    def run(
        layer_params: Params, x: jax.Array, cache: Cache | None, layer: Any, window: Any, only: jax.Array | None = None
    ) -> tuple[Any, ...]:
        spec_here = spec.replace(window=window, sparse=budgets.of_layer(layer) if budgets else None)
        return block.apply({"params": layer_params}, x, rotary, spec_here, is_token, cache, layer, only)

    x: Any = _embedding(config).apply({"params": params["embed"]}, tokens, dtype)
    residuals, routers = [x], []
    if isinstance(params["layers"], tuple):
        ks, vs = [], []
        for i, layer_params in enumerate(params["layers"]):
            last = only if i == config.num_layers - 1 else None
            x, (k, v), cache, router = run(layer_params, x, cache, i, windows[i], last)
            ks, vs = [*ks, k], [*vs, v]
            residuals, routers = [*residuals, x], [*routers, router]
        kv = (tuple(ks), tuple(vs))
        router = jax.tree.map(lambda *layers: jnp.stack(layers), *routers)
        layers = jnp.stack(residuals) if return_layers else None
    else:
        # of differing layers, those without a window get one that holds every position
        window = None if len(set(windows)) == 1 else jnp.asarray([w or 2**30 for w in windows])

        def scanned(carry: Any, per_layer: Any) -> tuple[Any, Any]:
            x, cache = carry
            x = checkpoint_name(x, "residual")
            layer_params, layer, window = per_layer
            x, kv, cache, router = run(layer_params, x, cache, layer, windows[0] if window is None else window)
            return (x, cache), (kv if keep_kv else None, router, x if return_layers else None)

        per_layer = (params["layers"], jnp.arange(config.num_layers), window)
        (x, cache), (kv, router, layers) = lax.scan(rematerialised(scanned, remat), (x, cache), per_layer)
        layers = jnp.concatenate([residuals[0][None], layers]) if return_layers else None
        x = take_token(x, only)

    hidden: Any = RMSNorm(config.rms_norm_eps, "norm").apply({"params": params["final_norm"]}, x)
    return Output(hidden, cache, kv if keep_kv else None, layers, router)


def unembed(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D]; give it only the positions whose logits are needed."""
    head = params["embed"] if config.tie_word_embeddings else params["lm_head"]
    logits: Any = _embedding(config).apply({"params": head}, hidden, method="logits")
    return constrain(logits, "batch", *["sequence"] * (logits.ndim - 2), "vocab")
