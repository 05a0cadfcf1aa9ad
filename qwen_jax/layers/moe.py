"""Mixture of experts: softmax over all experts, then top-k; dropless, as grouped matrix products."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.config import MoeConfig
from qwen_jax.layers.linear import Linear
from qwen_jax.layers.mlp import Mlp
from qwen_jax.layers.param import declare

# lhs [rows, in] grouped along rows, rhs [E, out, in]
_GROUPED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


class RouterStats(flax.struct.PyTreeNode):
    """What the load-balancing loss needs of one layer (or, stacked, of all): sums over real tokens, float32."""

    assignments: jax.Array  # [..., E] number of top-k choices that fell on each expert
    prob_sums: jax.Array  # [..., E] sum of router probabilities
    num_tokens: jax.Array  # [...]


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """E * sum_e f_e P_e over the tokens of all layers together (Switch, arXiv 2101.03961; `top_k` when balanced)."""
    layers = tuple(range(stats.assignments.ndim - 1))
    num_tokens = jnp.sum(stats.num_tokens)
    fraction = jnp.sum(stats.assignments, layers) / num_tokens
    prob = jnp.sum(stats.prob_sums, layers) / num_tokens
    return stats.assignments.shape[-1] * jnp.sum(fraction * prob)


class Experts(nn.Module):
    """E SwiGLU feed-forwards applied to rows already sorted by expert."""

    moe: MoeConfig
    hidden_size: int
    std: float

    @nn.compact
    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """rows [N, D], the first group_sizes[0] of them for expert 0 and so on; returns float32 [N, D]."""
        wide = (self.moe.num_experts, self.moe.expert_intermediate_size, self.hidden_size)
        narrow = (self.moe.num_experts, self.hidden_size, self.moe.expert_intermediate_size)

        def grouped(name: str, shape: tuple[int, ...], axes: tuple[str, ...], x: jax.Array) -> jax.Array:
            kernel = declare(self, name, nn.initializers.normal(self.std), shape, ("expert", *axes)).astype(x.dtype)
            return lax.ragged_dot_general(x, kernel, group_sizes, _GROUPED, preferred_element_type=jnp.float32)

        gate = grouped("gate", wide, ("expert_mlp", "embed"), rows).astype(rows.dtype)
        up = grouped("up", wide, ("expert_mlp", "embed"), rows).astype(rows.dtype)
        return grouped("down", narrow, ("embed", "expert_mlp"), nn.silu(gate) * up)


class Moe(nn.Module):
    """top-k routed experts, plus the shared expert behind its sigmoid gate if there is one (Qwen2 report, eq. 1-2)."""

    moe: MoeConfig
    hidden_size: int
    std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array, is_token: jax.Array | None) -> tuple[jax.Array, RouterStats]:
        """x [B, T, D]; is_token [B, T] bool is False at padding, which is computed but not counted."""
        moe, dtype = self.moe, x.dtype
        flat = x.reshape(-1, x.shape[-1])  # [N, D]
        router = Linear((moe.num_experts,), (self.hidden_size,), ("expert",), ("embed",), std=self.std, name="router")
        probs = nn.softmax(router(flat).astype(jnp.float32), axis=-1)  # [N, E]
        weights, chosen = lax.top_k(probs, moe.top_k)  # [N, k]
        if moe.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(dtype)

        order = jnp.argsort(chosen.reshape(-1), stable=True)  # rows by expert
        one_hot = jax.nn.one_hot(chosen, moe.num_experts, dtype=jnp.float32).sum(1)  # [N, E]
        group_sizes = one_hot.sum(0).astype(jnp.int32)
        rows = jnp.take(flat, order // moe.top_k, axis=0)  # [N k, D]
        out = Experts(moe, self.hidden_size, self.std, name="experts")(rows, group_sizes)
        out = jnp.zeros_like(out).at[order].set(out).reshape(*chosen.shape, -1)  # [N, k, D]
        y = jnp.sum(out * weights.astype(jnp.float32)[..., None], axis=1).astype(dtype)

        if moe.shared_intermediate_size:
            gate = Linear((1,), (self.hidden_size,), ("shared_gate",), ("embed",), std=self.std, name="shared_gate")
            shared = Mlp(self.hidden_size, moe.shared_intermediate_size, self.std, self.std, name="shared")
            y += nn.sigmoid(gate(flat)) * shared(flat)

        counted = jnp.ones(flat.shape[:1]) if is_token is None else is_token.reshape(-1).astype(jnp.float32)
        stats = RouterStats(
            assignments=jnp.sum(one_hot * counted[:, None], 0),
            prob_sums=jnp.sum(probs * counted[:, None], 0),
            num_tokens=jnp.sum(counted),
        )
        return y.reshape(x.shape), stats
