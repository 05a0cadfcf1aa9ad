"""Mixture of experts: softmax over all experts, then top-k; dropless, as grouped matrix products."""

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.backend import current_backend
from qwen_jax.config import MoeConfig
from qwen_jax.layers.linear import Linear
from qwen_jax.layers.mlp import Mlp
from qwen_jax.layers.param import declare
from qwen_jax.layers.sharded_experts import NARROW, WIDE, sharded_experts
from qwen_jax.leaves import Leaf, grouped_matmul, swiglu
from qwen_jax.sharding import constrain, current_mesh


class RouterStats(flax.struct.PyTreeNode):
    """What the load-balancing loss needs of one layer (or, stacked, of all): sums over real tokens, float32."""

    assignments: jax.Array  # [..., E] number of top-k choices that fell on each expert
    prob_sums: jax.Array  # [..., E] sum of router probabilities
    num_tokens: jax.Array  # [...]


def load_balancing_loss(stats: RouterStats, counts: RouterStats | None = None) -> jax.Array:
    """E * sum_e f_e P_e, with the gradient through P only (Switch, arXiv 2101.03961; `top_k` when balanced).

    stats: of this micro-batch, with layers in front. P_e, the mean router probability, is this micro-batch's. f_e, the
    share of assignments, is this micro-batch's too; or, given `counts`, of all micro-batches summed there, so that
    experts may specialise within one (global-batch balance, arXiv 2501.11873). Without a token the loss is 0.
    """
    counts = lax.stop_gradient(counts or stats)
    fraction = jnp.sum(counts.assignments, 0) / jnp.maximum(jnp.sum(counts.num_tokens), 1)
    prob = jnp.sum(stats.prob_sums, 0) / jnp.maximum(jnp.sum(stats.num_tokens), 1)
    return stats.assignments.shape[-1] * jnp.sum(fraction * prob)


def expert_mlp(rows: jax.Array, group_sizes: jax.Array, kernels: tuple[Leaf, ...]) -> jax.Array:
    """Each expert's SwiGLU on its rows: rows [N, D], the first group_sizes[0] of them for expert 0 and so on.

    kernels: gate and up [E, M, D], down [E, D, M]. Returns [N, D] in rows' dtype or float32, whichever is the faster;
    rows beyond the groups are undefined.
    """
    dtype = current_backend().product_dtype or rows.dtype

    def grouped(x: jax.Array, kernel: Leaf) -> jax.Array:
        return grouped_matmul(kernel, x, group_sizes, dtype)

    gate, up, down = kernels
    wide = (checkpoint_name(grouped(rows, kernel).astype(rows.dtype), "experts") for kernel in (gate, up))
    return grouped(swiglu(*wide), down)


def routed(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: tuple[Leaf, ...],
    experts: Callable[..., jax.Array] = expert_mlp,
    parts: int = 1,
) -> jax.Array:
    """sum_k weights[n, k] expert_{chosen[n, k]}(x[n]); x [N, D], chosen and weights [N, k]; float32 [N, D].

    experts: what is done with the rows by expert, see `expert_mlp`; it may hand them on where `kernels` are those of
    one of `parts` of the experts.
    """
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # rows by expert
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))  # where each choice's row lies
    sizes = jnp.bincount(chosen.reshape(-1), length=parts * kernels[0].shape[0])
    out = _by_token(experts(_by_expert(x, order, place), sizes, kernels), order, place)
    out = out.reshape(*chosen.shape, -1)  # [N, k, D]
    return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)[..., None], axis=1)


# The gradient of a gather is a sum in no order; these rows are permuted, so that theirs is a gather as well.


@jax.custom_vjp
def _by_expert(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """x [N, D] once for each of its k choices, in their `order` [N k]: [N k, D]."""
    return jnp.take(x, order // (len(order) // len(x)), axis=0)


def _by_expert_backward(place: jax.Array, d_rows: jax.Array, num_tokens: int) -> jax.Array:
    d_rows = jnp.take(d_rows, place, axis=0).reshape(num_tokens, -1, d_rows.shape[1])
    return jnp.sum(d_rows, axis=1, dtype=jnp.float32).astype(d_rows.dtype)


_by_expert.defvjp(
    lambda x, order, place: (_by_expert(x, order, place), (place, jnp.empty((len(x), 0)))),
    lambda kept, d_rows: (_by_expert_backward(kept[0], d_rows, len(kept[1])), None, None),
)


@jax.custom_vjp
def _by_token(rows: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """The way back: rows [N k, D] by expert, in the order of the choices."""
    return jnp.take(rows, place, axis=0)


_by_token.defvjp(
    lambda rows, order, place: (_by_token(rows, order, place), order),
    lambda order, d_rows: (jnp.take(d_rows, order, axis=0), None, None),
)


class Experts(nn.Module):
    """E SwiGLU feed-forwards, of which each token is given to the ones that were chosen for it."""

    moe: MoeConfig
    hidden_size: int
    std: float

    @nn.compact
    def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """x [B, T, D]; chosen int and weights, both [B, T, k]; the weighted sum, [B, T, D]."""
        wide = (self.moe.num_experts, self.moe.expert_intermediate_size, self.hidden_size)
        narrow = (self.moe.num_experts, self.hidden_size, self.moe.expert_intermediate_size)

        def kernel(name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Leaf:
            # what FSDP splits is gathered by `sharded_experts`
            return declare(self, name, nn.initializers.normal(self.std), shape, axes)

        kernels = (kernel("gate", wide, WIDE), kernel("up", wide, WIDE), kernel("down", narrow, NARROW))
        mesh = current_mesh()
        if mesh is not None:
            return sharded_experts(routed, expert_mlp, x, chosen, weights, kernels, mesh)
        flat = x.reshape(-1, x.shape[-1])
        y = routed(flat, chosen.reshape(len(flat), -1), weights.reshape(len(flat), -1), kernels)
        return y.astype(x.dtype).reshape(x.shape)


class Moe(nn.Module):
    """top-k routed experts, plus the shared expert behind its sigmoid gate if there is one (Qwen2 report, eq. 1-2)."""

    moe: MoeConfig
    hidden_size: int
    std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array, is_token: jax.Array | None) -> tuple[jax.Array, RouterStats]:
        """x [B, T, D]; is_token [B, T] bool is False at padding, which is computed but not counted."""
        moe = self.moe
        router = Linear((moe.num_experts,), (self.hidden_size,), ("router",), ("embed",), std=self.std, name="router")
        logits = constrain(router(x).astype(jnp.float32), "batch", "sequence", None)
        probs = nn.softmax(logits, axis=-1)  # [B, T, E]
        weights, chosen = lax.top_k(probs, moe.top_k)  # [B, T, k]
        if moe.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        y = Experts(moe, self.hidden_size, self.std, name="experts")(x, chosen, weights.astype(x.dtype))

        if moe.shared_intermediate_size:
            gate = Linear((1,), (self.hidden_size,), ("shared_gate",), ("embed",), std=self.std, name="shared_gate")
            shared = Mlp(self.hidden_size, moe.shared_intermediate_size, self.std, self.std, name="shared")
            y += nn.sigmoid(gate(x)) * shared(x)

        counted = jnp.ones(x.shape[:2]) if is_token is None else is_token.astype(jnp.float32)
        one_hot = jax.nn.one_hot(chosen, moe.num_experts, dtype=jnp.float32).sum(2)  # [B, T, E]
        stats = RouterStats(
            assignments=jnp.sum(one_hot * counted[..., None], (0, 1)),
            prob_sums=jnp.sum(probs * counted[..., None], (0, 1)),
            num_tokens=jnp.sum(counted),
        )
        return y, stats
