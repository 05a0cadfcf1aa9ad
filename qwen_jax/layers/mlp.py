"""SwiGLU feed-forward."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.layers.linear import Linear
from qwen_jax.sharding import constrain


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
        def widen(name: str) -> Linear:
            return Linear((self.features,), (self.hidden_size,), ("mlp",), ("embed",), std=self.std, name=name)

        hidden = swiglu(widen("gate")(x), widen("up")(x))  # [B, T, F]
        hidden = constrain(hidden, "batch", "sequence", "mlp")
        down = Linear((self.hidden_size,), (self.features,), ("embed",), ("mlp",), std=self.down_std, name="down")
        return down(hidden)
