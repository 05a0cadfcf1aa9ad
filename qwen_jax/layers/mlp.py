"""SwiGLU feed-forward."""

import flax.linen as nn
import jax

from qwen_jax.layers.param import declare_gathered
from qwen_jax.leaves import Leaf, swiglu_mlp


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)) of hidden width `features`."""

    hidden_size: int
    features: int
    std: float = 0.02
    down_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide, narrow = (self.features, self.hidden_size), (self.hidden_size, self.features)
        gate = Kernel(wide, ("mlp", "embed"), self.std, name="gate")()
        up = Kernel(wide, ("mlp", "embed"), self.std, name="up")()
        down = Kernel(narrow, ("embed", "mlp"), self.down_std, name="down")()
        return swiglu_mlp(gate, up, down, x)


class Kernel(nn.Module):
    """A matrix without the product."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    std: float

    @nn.compact
    def __call__(self) -> Leaf:
        return declare_gathered(self, "kernel", nn.initializers.normal(self.std), self.shape, self.axes)
