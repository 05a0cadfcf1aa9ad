"""What the kernels for NVIDIA GPUs share."""

import math

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)
# In units of which 2 to the power is taken: the maximum of a row that sees no key, and a masked score, so far below it
# that its weight is 0 even there.
NOTHING, HIDDEN = -1e30, -1e38


def dot(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    """The product of two matrices over these axes, in float32; of float32 ones without rounding them to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
