"""Projections. Weights are stored as PyTorch stores them, [out, in], so conversion never transposes."""

import math

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.layers.param import declare_gathered
from qwen_jax.leaves import project


class Linear(nn.Module):
    """y[..., *out] = kernel[*out, *in] x[..., *in] (+ bias[*out]), accumulated in float32, returned in x's dtype."""

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_axes: tuple[str, ...]
    in_axes: tuple[str, ...]
    use_bias: bool = False
    std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, shape, axes = (
            nn.initializers.normal(self.std),
            self.out_shape + self.in_shape,
            self.out_axes + self.in_axes,
        )
        kernel = declare_gathered(self, "kernel", init, shape, axes)
        bias = None
        if self.use_bias:
            bias = declare_gathered(self, "bias", nn.initializers.zeros, self.out_shape, self.out_axes)
        return checkpoint_name(project(kernel, x, len(self.in_shape), bias), self.name or "")


def residual_std(std: float, num_layers: int) -> float:
    """Qwen1's smaller initialisation of the two projections that write to the residual stream (B1: std / sqrt(2 L))."""
    return std / math.sqrt(2 * num_layers)
