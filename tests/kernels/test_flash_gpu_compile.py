"""Flash attention for GPUs, compiled for an H200 on a machine without: it uses the matrix units and stays small."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# What the compiler wants to know of the device; the values of openxla/xla, xla/backends/gpu/target_config/specs.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA H200 141GB HBM3e" model_str: "sm_9.0a H200" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  platform_version: "Compute Capability 9.0a" driver_version: "13.0.0" runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""
PROGRAM = """
import glob, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qwen_jax.kernels.flash_gpu import flash_attention

target, folder = sys.argv[1:]
topology = topologies.get_topology_desc("", platform="cuda", target_config=target, topology="1x1x1")
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
sharding = NamedSharding(mesh, PartitionSpec())

def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

for i, (heads, num_kv_heads, width, length, dtype, options) in enumerate((
    (14, 2, 64, 4096, jnp.bfloat16, dict(segments=True)),
    (28, 4, 128, 4096, jnp.bfloat16, {}),
    (28, 4, 128, 1000, jnp.float16, dict(window=256)),
    (64, 8, 128, 8192, jnp.bfloat16, dict(chunk_length=6144)),
    (14, 2, 64, 1024, jnp.float32, {}),
)):
    segmented = options.pop("segments", False)
    q = array((*(3,) * ("chunk_length" in options), 1, length, heads, width), dtype)
    k = array((1, num_kv_heads, length, width), dtype)
    segments = array((1, length), jnp.int32)

    def loss(q, k, v, segments):
        ids = segments if segmented else None
        out = flash_attention(q, k, v, query_segments=ids, key_segments=ids, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    dump = f"{folder}/{i}"
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, segments)
    memory = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_emitter_re": "ptx"}).memory_analysis()
    code = [open(path).read() for path in glob.glob(dump + "/*.ptx")]
    products = {
        name: sum(text.count("wgmma.mma_async") for text in code if f".entry {name}" in text and "sm_90a" in text)
        for name in ("flash_forward", "flash_d_query", "flash_d_key")
    }
    query_bytes = q.size * q.dtype.itemsize
    print(json.dumps([jnp.dtype(dtype).name, products, memory.temp_size_in_bytes, query_bytes]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="jax-cuda12-plugin and jax-cuda12-pjrt, which compile for NVIDIA GPUs, are not installed",
)
def test_compiles(tmp_path: Path) -> None:
    """16-bit kernels multiply with wgmma, and temporaries are a few arrays like q, none of T x S scores."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, H200, str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    assert len(reports) == 5
    for dtype, products, temporaries, query_bytes in reports:
        for name, count in products.items():
            assert (count > 0) == (dtype != "float32"), name
        assert temporaries < 6 * query_bytes
