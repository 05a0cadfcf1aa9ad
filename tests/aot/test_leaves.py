"""Products with weights of few bits, compiled for TPUs: they stay so in HBM, and no copy of one is widened."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from aot import hlo
from aot.worker import ENVIRONMENT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the TPU compiler, is not installed: pip install 'qwen-jax[tpu]' (x86-64 Linux, no TPU needed)",
    ),
]

# the feed-forward of 7B for 8 rows: int4 by 128 with and without zeros, int8 by channel, float8 in blocks
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qwen_jax.backend import Backend
from qwen_jax.leaves import Grouped, Int8, matmul

O, K, G = 18944, 3584, 128
topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1], chips_per_host_bounds=(1, 1, 1))
everywhere = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
scale = array(jnp.float16, O, K // G)
weights = {
    "int4": Grouped(array(jnp.int4, O, K // G, G), scale),
    "int4 with zeros": Grouped(array(jnp.int4, O, K // G, G), scale, array(jnp.int4, O, K // G)),
    "int8": Int8(array(jnp.int8, O, K), array(jnp.float16, O)),
    "float8": Grouped(array(jnp.float8_e4m3fn, O, K // G, G), array(jnp.float32, O, K // G)),
}
cases = [(name, weight, Backend("tpu")) for name, weight in weights.items()]
cases.append(("int8 by int8", weights["int8"], Backend("tpu", integer_products=True)))
for name, weight, backend in cases:
    with backend.entered():
        lowered = jax.jit(lambda w, x: matmul(w, x, dtype=jnp.bfloat16)).lower(weight, array(jnp.bfloat16, 8, K))
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    print(json.dumps([name, memory.argument_size_in_bytes, memory.temp_size_in_bytes, compiled.as_text()]))
"""


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_no_weight_is_widened_in_hbm(topology: str) -> None:
    environment = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM, topology], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row[0]: row[1:] for row in map(json.loads, done.stdout.splitlines())}
    numbers = 18944 * 3584
    for name, (arguments, temporary, _) in rows.items():
        assert arguments < (0.6 if "int4" in name else 1.1) * numbers, name
        assert temporary < 0.05 * numbers, name
    assert len(rows) == 5
    # the matrix unit multiplies integers where activations are rounded to int8, and only there
    assert {name: products(text) for name, (_, _, text) in rows.items() if name.startswith("int8")} == {
        "int8": [("bf16", "s8", "f32")],
        "int8 by int8": [("s8", "s8", "s32")],
    }


def products(text: str) -> list[tuple[str, ...]]:
    """Types of both operands and of the result of each matrix product."""
    found = []
    for computation in hlo.parse(text).computations.values():
        for i in computation.values():
            if i.opcode in ("convolution", "dot"):
                found.append((*(computation[name].arrays[0].dtype for name in i.operands[:2]), i.arrays[0].dtype))
    return found
