"""Flash attention, compiled ahead of time for real TPUs on a machine that has none, beside JAX's splash attention."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed"
    ),
]
# In a process of its own: libtpu reads these before it loads, and ends the process where it cannot go on.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
PRELUDE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qwen_jax.kernels.flash import chip, flash_attention, flash_attention_lse

topology = sys.argv[1]
mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1]), ("x",))

def array(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

def temporaries(function, *arguments):
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

def gradients(attention):
    def loss(qkv, *rest):
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(attention(*qkv, *rest)))

    return jax.grad(loss)

def splash(heads, length, **options):
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    sizes = splash_attention_kernel.BlockSizes(**{f"block_{name}": 512 for name in names}, **options)
    kernel = splash_attention_kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return jax.vmap(kernel)
"""


def run(program: str, topology: str, **environment: str) -> list[Any]:
    """What the program prints, a JSON value a line."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, topology],
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


SHAPES = """
for heads, num_kv_heads, width in ((14, 2, 64), (28, 4, 128), (64, 8, 128)):
    for length in (4096, 32768, 131072):
        q, k = array((1, length, heads, width)), array((1, num_kv_heads, length, width))
        name = f"{heads}/{num_kv_heads}/{width} {length}"
        both = temporaries(flash_attention, q, k, k), temporaries(gradients(flash_attention), (q, k, k))
        print(json.dumps([name, *both]), flush=True)

q, k, ids = array((2, 8192, 28, 128)), array((2, 4, 8192, 128)), array((2, 8192), jnp.int32)
def packed(q, k, v, ids):
    return flash_attention_lse(q, k, v, query_segments=ids, key_segments=ids, window=4096)
both = temporaries(packed, q, k, k, ids), temporaries(gradients(packed), (q, k, k), ids)
print(json.dumps(["packed documents", *both]), flush=True)

q, k, offset = array((3, 1, 4096, 28, 128)), array((1, 4, 131072, 128)), array((), jnp.int32)
def chunked(q, k, v, offset):
    return flash_attention(q, k, v, query_offset=offset, chunk_length=24576)
both = temporaries(chunked, q, k, k, offset), temporaries(gradients(chunked), (q, k, k), offset)
print(json.dumps(["dual chunks", *both]), flush=True)
"""


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_compiles(topology: str) -> None:
    """At the shapes of 0.5B, 7B and 72B to 128K tokens, on one chip; forward with q, out and v once more at most."""
    reports = run(SHAPES, topology)
    assert len(reports) == 3 * 3 + 2
    for name, forward, _ in reports[:9]:
        heads, length = name.split()
        num_heads, num_kv_heads, width = map(int, heads.split("/"))
        assert forward <= 2 * (2 * num_heads + num_kv_heads) * width * int(length) + (40 << 20), name


MEMORY = """
q, k, v = array((1, 32768, 28, 128)), array((1, 4, 32768, 128)), array((1, 4, 32768, 128))
print(json.dumps(["flash", temporaries(gradients(flash_attention), (q, k, v))]))
q = array((1, 28, 32768, 128))
print(json.dumps(["splash", temporaries(gradients(splash(28, 32768, block_q_dq=512, block_kv_dq=512)), (q, k, v))]))
"""


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_memory_beside_splash(topology: str) -> None:
    """7B, 32K tokens, forward and backward: less than half the temporaries of splash with its backward unfused."""
    sizes = dict(run(MEMORY, topology))
    assert sizes["flash"] < 0.5 * sizes["splash"], sizes


SCHEDULES = """
length = 8192
for width in (64, 128):
    q, k = array((1, length, 7, width)), array((1, 1, length, width))
    temporaries(gradients(flash_attention), (q, k, k))
    with jax.set_mesh(mesh):
        blocks = [x[width].fit(length, length, 7) for x in (chip().forward, chip().backward)]
    print(json.dumps([width, *[x.query * x.key / 512**2 for x in blocks]]), flush=True)
"""
SPLASH_SCHEDULES = """
for width in (64, 128):
    q, k = array((1, 7, 8192, width)), array((1, 1, 8192, width))
    temporaries(gradients(splash(7, 8192, block_q_dq=512, block_kv_dq=512)), (q, k, k))
    temporaries(gradients(splash(7, 8192, use_fused_bwd_kernel=True)), (q, k, k))
    print(json.dumps([width]), flush=True)
"""


def schedules(program: str, topology: str, folder: Path) -> tuple[list[Any], list[tuple[str, int]]]:
    """What the program prints, and (kernel, bundles of its longest stretch of products) as they were compiled."""
    reports = run(program, topology, LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true")
    found = []
    slots = "-final_hlo-static-per-bundle-utilization.txt"
    for path in sorted(folder.glob(f"*{slots}"), key=lambda x: x.stat().st_mtime_ns):
        kernel = re.search(r"flash_forward|flash_backward|splash_mha_(fwd|dq|dkv)", path.name)
        if not kernel:
            continue
        lines = path.read_text().splitlines()
        names = [name.strip() for name in lines[1].split(",")]
        first = next(i for i, line in enumerate(lines) if "UTILIZATION" in line) + 1
        used = [list(map(int, line.split())) for line in lines[first:] if line.strip()[:1].isdigit()]
        start = re.sub(r"-\d+$", "", path.name.removesuffix(slots))
        bundles = next(x for x in folder.glob(f"{start}-*-final_bundles.txt") if "schedule" not in x.name).read_text()
        branches = re.finditer(r"^\s*(0x[0-9a-f]+|0)\s.*?: .*sbr\.rel", bundles, re.MULTILINE)
        cuts = [0, *(int(branch[1], 16) for branch in branches), len(used)]
        products = names.index("MATMUL")
        _, length = max((sum(row[products] for row in used[a:b]), b - a) for a, b in zip(cuts, cuts[1:], strict=False))
        found.append((kernel[0], length))
    return reports, found


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_schedule_beside_splash(topology: str, tmp_path: Path) -> None:
    """Bundles of a tile of 512 queries and 512 keys that needs no mask, beside splash attention with blocks of 512."""
    (tmp_path / "flash").mkdir()
    (tmp_path / "splash").mkdir()
    reports, ours = schedules(SCHEDULES, topology, tmp_path / "flash")
    widths, theirs = schedules(SPLASH_SCHEDULES, topology, tmp_path / "splash")
    assert [kernel for kernel, _ in ours] == ["flash_forward", "flash_backward"] * 2
    for i, (width, *tiles) in enumerate(reports):
        forward, backward = (bundles / size for (_, bundles), size in zip(ours[2 * i : 2 * i + 2], tiles, strict=True))
        splash = theirs[len(theirs) // 2 * i :][
            : len(theirs) // 2
        ]  # forward, then (dq, dkv) in any order; forward, dkv
        fused = splash.pop()[1]
        unfused = {kernel: bundles for kernel, bundles in splash}
        print(topology, width, forward, backward, unfused, fused)
        assert forward <= 0.97 * unfused["splash_mha_fwd"]
        assert backward <= 0.75 * (unfused["splash_mha_dq"] + unfused["splash_mha_dkv"])
        assert backward <= fused
