"""SwiGLU feed-forward."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.layers.linear import Linear, project
from qwen_jax.sharding import constrain

# Features of one part, see `in_parts`: of 512 rows they fit a core's L2 cache of 2 MiB in bfloat16.
PART = 1664


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, computed in float32 and returned in gate's dtype."""
    return (nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)) of hidden width `features`."""

    hidden_size: int
    features: int
    std: float = 0.02
    down_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if parts := self.get_variable("params", "parts"):
            return _sum_of_parts(parts, x)

        def widen(name: str) -> Linear:
            return Linear((self.features,), (self.hidden_size,), ("mlp",), ("embed",), std=self.std, name=name)

        hidden = swiglu(widen("gate")(x), widen("up")(x))  # [B, T, F]
        hidden = constrain(hidden, "batch", "sequence", "mlp")
        down = Linear((self.hidden_size,), (self.features,), ("embed",), ("mlp",), std=self.down_std, name="down")
        return down(hidden)


def in_parts(mlp: dict[str, Any]) -> dict[str, Any]:
    """`Mlp`'s parameters as those of narrower ones whose sum it is: of each, gate and up [2, f, D], and down [D, f].

    The same sum in another order, which XLA:CPU multiplies faster in bfloat16 (docs/performance.md).
    """
    gate, up, down = (mlp[name]["kernel"] for name in ("gate", "up", "down"))
    count = -(-gate.shape[0] // PART)
    size = -(-gate.shape[0] // count // 64) * 64
    cuts = [slice(start, start + size) for start in range(0, gate.shape[0], size)]
    return {"parts": tuple((jnp.stack([gate[cut], up[cut]]), down[:, cut]) for cut in cuts)}


def _sum_of_parts(parts: tuple[tuple[jax.Array, jax.Array], ...], x: jax.Array) -> jax.Array:
    y: Any = 0.0
    for gate_up, down in parts:
        both: Any = project(gate_up, x)  # float32 [B, T, 2, f]
        half, up = 0.5 * both[..., 0, :], both[..., 1, :]
        # silu(g) = g sigmoid(g) = h (1 + tanh h), h = g / 2, within 1e-7 |g|; XLA:CPU is faster at tanh than at exp
        y += project(down, (half * (1 + jnp.tanh(half)) * up).astype(x.dtype))
    return y.astype(x.dtype)
