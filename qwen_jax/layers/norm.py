"""RMSNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.layers.param import declare_gathered


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis in float32, cast to x's dtype and only then multiplied by the gain (as PyTorch)."""

    eps: float
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = declare_gathered(self, "scale", nn.initializers.ones, x.shape[-1:], (self.axis,))
        x32 = x.astype(jnp.float32)
        y = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape) * y.astype(x.dtype)
