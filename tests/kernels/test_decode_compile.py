"""Decode attention, compiled ahead of time for real TPUs on a machine that has none: it fits, and copies no cache."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# In a process of its own: libtpu reads these before it loads, and ends the process where it cannot go on.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qwen_jax.cache import ContiguousCache
from qwen_jax.kernels.decode import decode_attention, paged_decode_attention

topology, splits = sys.argv[1], int(sys.argv[2])
device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
layers, chunk, page = 4, 24576, 128

def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

def report(name, function, *arguments, donate=()):
    memory = jax.jit(function, donate_argnums=donate).lower(*arguments).compile().memory_analysis()
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    print(json.dumps([name, memory.temp_size_in_bytes, memory.argument_size_in_bytes, stored]), flush=True)

for heads, num_kv_heads, width in ((14, 2, 64), (28, 4, 128), (64, 8, 128)):
    for batch, capacity, dtype, dca in (
        (8, 4096, jnp.bfloat16, False), (1, 131072, jnp.bfloat16, False), (1, 131072, jnp.bfloat16, True),
        (8, 32768, jnp.int8, False), (1, 131072, jnp.int8, True),
    ):
        name = f"{heads}/{num_kv_heads}/{width} {batch}x{capacity} {jnp.dtype(dtype).name}{' DCA' * dca}"
        q = array((*(3,) * dca, batch, heads, width), jnp.bfloat16)
        lengths, layer = array((batch,), jnp.int32), array((), jnp.int32)
        options = dict(splits=splits, chunk_length=chunk if dca else None)

        def contiguous(q, k, v, lengths, layer, k_scale=None, v_scale=None):
            return decode_attention(q, k, v, lengths, layer=layer, k_scale=k_scale, v_scale=v_scale, **options)

        def paged(q, k, v, lengths, layer, tables, k_scale=None, v_scale=None):
            return paged_decode_attention(
                q, k, v, lengths, tables, layer=layer, k_scale=k_scale, v_scale=v_scale, **options
            )

        k = array((layers, batch, num_kv_heads, capacity, width), dtype)
        scales = [array(k.shape[:-1], jnp.float32)] * 2 if dtype == jnp.int8 else []
        report(name, contiguous, q, k, k, lengths, layer, *scales)
        num_pages = batch * capacity // page
        k = array((layers, num_kv_heads, num_pages, page, width), dtype)
        scales = [array((layers, num_pages, num_kv_heads, page), jnp.float32)] * 2 if dtype == jnp.int8 else []
        tables = array((batch, capacity // page), jnp.int32)
        report(name + " paged", paged, q, k, k, lengths, layer, tables, *scales)

    def step(cache, x):
        def one(layer, state):
            cache, x = state
            q = x.reshape(-1, heads, width)
            k, v = q[:, :num_kv_heads, None], q[:, -num_kv_heads:, None]
            cache = cache.write(layer, k, v, cache.lengths)
            out = decode_attention(q, cache.k, cache.v, cache.lengths + 1, layer=layer, splits=splits)
            return cache, x + out.reshape(x.shape)

        cache, x = jax.lax.fori_loop(0, layers, one, (cache, x))
        return cache.replace(lengths=cache.lengths + 1), x

    k = array((layers, 8, num_kv_heads, 32768, width), jnp.bfloat16)
    lengths = array((8,), jnp.int32)
    x = array((8, heads * width), jnp.bfloat16)
    cache = ContiguousCache(k, k, lengths, lengths)
    report(f"{heads}/{num_kv_heads}/{width} a step of all layers", step, cache, x, donate=0)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed"
)
@pytest.mark.parametrize(("topology", "splits"), [("v5e:1x1", 1), ("v5p:1x1x1", 2), ("v6e:1x1", 1)])
def test_compiles(topology: str, splits: int) -> None:
    """At the shapes of 0.5B, 7B and 72B: temporaries below 2 MiB beside up to 4 GiB of cache, and no padded cache."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, str(splits)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    assert len(reports) == 3 * (5 * 2 + 1)
    for name, temporaries, arguments, stored in reports:
        assert temporaries < 2 << 20, name
        assert arguments < 1.05 * stored + (1 << 20), name
