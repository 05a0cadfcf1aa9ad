"""Products with weights as the layers use them: rounded to the type of the activations."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.backend import current_backend
from qwen_jax.leaves.native import native_mlp
from qwen_jax.leaves.packed import Half, Packed, packed_mlp
from qwen_jax.leaves.weight import Leaf, matmul
from qwen_jax.sharding import constrain


def project(weight: Leaf, x: jax.Array, num_in: int = 1, bias: jax.Array | None = None) -> jax.Array:
    """weight[*out, *in] x[*batch, *in] (+ bias[*out]), summed in float32: [*batch, *out] in x's dtype."""
    # Where devices each sum a part of a product they exchange their sums in its type: bfloat16 halves what links carry.
    dtype = (current_backend().product_dtype or x.dtype) if bias is None else jnp.float32
    y = matmul(weight, x, num_in, dtype)
    if bias is not None:
        y += bias.astype(jnp.float32).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return y.astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, computed in float32 and returned in gate's dtype."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def swiglu_mlp(gate: Leaf, up: Leaf, down: Leaf, x: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x)); gate and up [F, D], down [D, F], x [B, T, D]."""
    if isinstance(gate, Half) and isinstance(up, Half) and isinstance(down, Packed):
        return packed_mlp(gate, down, x)
    if (y := native_mlp(gate, up, down, x)) is not None:
        return y
    wide = checkpoint_name(project(gate, x), "gate"), checkpoint_name(project(up, x), "up")
    hidden = constrain(swiglu(*wide), "batch", "sequence", "mlp")  # [B, T, F]
    return checkpoint_name(project(down, hidden), "down")
