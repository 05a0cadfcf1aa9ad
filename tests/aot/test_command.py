"""`qwen-jax compile` without a compiler: names of slices, refusals of memory, options, the rows of the table."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from aot import experiments, hlo
from aot.census import Census, Collectives
from aot.chips import GIB, parse_topology
from aot.command import Compile, program_of
from aot.memory import Memory, blocks, parse_out_of_memory, second_copies
from aot.programs import Program, check
from aot.report import Report, advice, refusal, short_name
from aot.search import candidates, meshes, step_times
from aot.table import ADAPTERS, DECODING, PEERS, SLICES, TRAINING, label
from aot.targets import parse_target
from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.presets import load_preset

# --- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "chips", "cloud"),
    [
        ("v5e-16", "v5e:4x4", 16, "v5e-16"),
        ("V5E:4x4", "v5e:4x4", 16, "v5e-16"),
        ("v6e-8", "v6e:2x4", 8, "v6e-8"),
        ("v5p-8", "v5p:2x2x2", 8, "v5p-16"),
        ("v5p:4x4x8", "v5p:4x4x8", 128, "v5p-256"),
        ("v5p:4x8x8", "v5p:4x8x8", 256, "v5p-512"),
    ],
)
def test_names_of_slices(text: str, name: str, chips: int, cloud: str) -> None:
    topology = parse_topology(text)
    assert (topology.name, topology.num_chips, topology.accelerator_type) == (name, chips, cloud)


def test_several_slices() -> None:
    topology = parse_topology("4 x v5p:4x4x8")
    assert (topology.name, topology.slice_name) == ("4 x v5p:4x4x8", "v5p:4x4x8")
    assert (topology.num_chips, topology.accelerator_type) == (512, "v5p-256")
    assert parse_topology("2xv5e-256").num_slices == 2


@pytest.mark.parametrize(
    "text", ["0xv5e-4", "2xtpu7x-8", "v5e", "v5e-5", "v9x-4", "v5e:2x2x2", "v5p:4x4", "v5p:0x4x4", ""]
)
def test_slices_that_are_none(text: str) -> None:
    with pytest.raises(InputError):
        parse_topology(text)


def test_rings_of_a_slice() -> None:
    """2-D sides close at 16; 3-D slices of whole cubes of 4 close everywhere."""
    assert parse_topology("v5e:8x16").rings == (False, True)
    assert parse_topology("v5p:4x4x8").rings == (True, True, True)
    assert parse_topology("v5p:2x4x4").rings == (False, False, False)


def test_gpus_of_one_machine() -> None:
    topology = parse_target("h200-8")
    assert (topology.name, topology.num_devices) == ("h200-8", 8)


# --- memory -----------------------------------------------------------------------------------------------------------

EARLY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (16.41G) exceeds available HBM (15.75G). HLO module: jit_step."
)
LATE = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 173.16M of 168.00M hbm. Exceeded hbm capacity by 5.16M.

Total hbm usage >= 431.16M:
    reserved        258.01M

  Largest program allocations in hbm:

  1. Size: 32.00M
     Operator: op_name="jit(step)/jvp()/while/body/mlp/dot_general"
     Shape: bf16[1,2048,8192]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 32.00M
     XLA label: copy-start.1 = copy-start(get-tuple-element.656)
     Allocation type: HLO temp
     ==========================

  2. Size: 8.00M
     Shape: bf16[4,8192,128]{2,1,0:T(8,128)(2,1)}
     XLA label: convert.56 = convert(copy-done.12)
     Allocation type: HLO temp
     ==========================
"""


def test_early_refusal() -> None:
    refused = parse_out_of_memory(EARLY)
    assert refused and refused.early and not refused.allocations
    assert (refused.needed, refused.available) == (round(16.41 * GIB), round(15.75 * GIB))


def test_late_refusal_names_allocations() -> None:
    refused = parse_out_of_memory(LATE)
    assert refused and not refused.early
    assert [(a.num_bytes, a.shape) for a in refused.allocations] == [
        (32 << 20, "bf16[1,2048,8192]"),
        (8 << 20, "bf16[4,8192,128]"),
    ]
    assert refused.allocations[0].name.endswith("mlp/dot_general")


def test_other_errors_are_no_refusal() -> None:
    assert parse_out_of_memory("INVALID_ARGUMENT: something else") is None


BUFFERS = """BufferAssignment:
allocation 0: size 1048576, page 0, parameter 1, shape |bf16[8,1,512,128]| at ShapeIndex {}, maybe-live-out:
 value: <1 state.1 @0> (size=1048576,offset=0): bf16[8,1,512,128]{3,2,1,0}
 value: <2 scatter.1 @0> (size=1048576,offset=0): bf16[8,512,128]{2,1,0}
allocation 1: size 9437184, page 0, preallocated-temp:
 value: <3 fusion.1 @0> (size=1048576,offset=0): bf16[8,512,128]{2,1,0}
 value: <4 fusion.2 @0> (size=4194304,offset=1048576): bf16[2048,1024]{1,0}
 value: <5 fusion.3 @0> (size=2097152,offset=5242880): f32[512,999]{1,0}
allocation 2: size 9437184, color 1, page 0, preallocated-temp:
 value: <6 fusion.4 @0> (size=8388608,offset=0): bf16[4096,1024]{1,0}
"""
PROGRAM = """ENTRY %main (state.1: bf16[8,1,512,128], w: s8[2048,1024]) -> f32[] {
  %state.1 = bf16[8,1,512,128]{3,2,1,0} parameter(1), metadata={op_name="state.cache.k[0]"}
  %w = s8[2048,1024]{1,0} parameter(0), metadata={op_name="params['layers'][0]['mlp']['up']['kernel']"}
  ROOT %fusion.2 = bf16[2048,1024]{1,0} fusion(%w), metadata={op_name="jit(decode)/while/body/mlp/up/convert"}
}
"""


def test_what_is_in_memory_twice() -> None:
    """A temporary as large as the cache, and an int8 matrix converted; not the cache itself, nor what lies in VMEM."""
    module = hlo.parse(PROGRAM)
    found = blocks(BUFFERS, module)
    assert found[0].allocation.name == "jit(decode)/while/body/mlp/up/convert"
    assert [copy.shape for copy in second_copies(found, module)] == ["bf16[2048,1024]", "bf16[8,512,128]"]


def test_an_int8_cache_twice() -> None:
    """In its own type as well; a matrix in its own type is no copy, as it may be another of that shape."""
    module = hlo.parse(PROGRAM.replace("bf16[8,1,512,128]", "s8[8,1,512,128]").replace("s8[2048", "s4[2048"))
    buffers = BUFFERS.replace("bf16[8,512,128]", "s8[8,512,128]").replace("bf16[2048", "s4[2048")
    assert [copy.shape for copy in second_copies(blocks(buffers, module), module)] == ["s8[8,512,128]"]


def test_no_step_is_shorter_than_its_compute_or_its_memory_traffic() -> None:
    """On v5e, 197 TFLOP/s and 819 GB/s: a second of the one, two of the other, and half a second of waiting."""
    program = Program("qwen2.5-7b", "v5e-4", "train", 4, 4096, (("fsdp", 4),))
    waits = Collectives("all-reduce", ("fsdp",), 1, 0, 0.5, 0.0, "", "")
    found = Census((waits,), 197e12, 2 * 819e9, 2.5, 0.0, {}, 0)
    report = Report(program, parse_target("v5e-4"), Memory(1, 0, 0, 0), found, None, (), 0.0, 0.0, {})
    assert report.step_seconds == pytest.approx(2.5)
    assert report.mfu_ceiling == pytest.approx(report.model_flops / 197e12 / 2.5)
    assert report.problems == ["more time for HBM, 2 s, than for compute, 1 s"]


def report_of(program: Program, message: str) -> Report:
    return Report(program, parse_target(program.target), None, None, parse_out_of_memory(message), (), 0.0, 0.0, {})


def test_refusal_is_one_sentence() -> None:
    program = Program("qwen2.5-7b", "v5e-4", "train", 4, 4096, (("fsdp", 4),))
    text = refusal(report_of(program, LATE))
    assert text.startswith(
        "0.01 GiB of HBM are missing on each chip (0.17 GiB of 0.16 GiB); the largest allocations are "
    )
    assert "0.03 GiB bf16[1,2048,8192] of mlp/dot_general" in text
    assert "--moments bfloat16" in text
    assert text.count(". ") == 0 and text.endswith(".")
    assert refusal(report_of(program, EARLY)).startswith("about 0.66 GiB")


def test_advice_follows_the_program() -> None:
    rows = Program("qwen2.5-7b", "v5e-4", "train", 16, 4096, (("fsdp", 4),), remat="dots")
    assert advice(rows)[:2] == ["--remat full", "--accumulate 2"]
    served = Program("qwen2.5-7b", "v5e-1", "decode", 8, 4096)
    assert "--weights int8" in advice(served)
    assert "--weights int8" not in advice(Program("qwen2.5-7b", "v5e-1", "decode", 8, 4096, weights="int8"))


def test_short_names() -> None:
    assert short_name("jit(step)/transpose(jvp())/while/body/closed_call/Block/mlp/gate/dot_general") == (
        "mlp/gate/dot_general"
    )
    assert short_name("params['embed']['embedding']") == "params/embed/embedding"


# --- the command ------------------------------------------------------------------------------------------------------


def test_program_of_the_options() -> None:
    program = program_of(Compile(model="qwen2.5-72b", topology="v5p:4x4x8", mesh="fsdp=-1,tensor=4"))
    assert (program.mesh, program.batch) == ((("fsdp", 32), ("tensor", 4)), 32)
    assert Program.from_json(program.to_json()) == program


def test_an_experiment_is_compiled_as_it_stands() -> None:
    program = program_of(Compile(experiment="pretrain_72b", topology="v5p-128"))
    assert (program.batch, program.accumulate, program.remat) == (1024, 8, "minimal")
    assert program.mesh == (("fsdp", 64), ("tensor", 2))
    assert program.config.num_layers == 80 and program.config.rope_theta == 10_000
    assert Program.from_json(program.to_json()) == program


def test_slices_are_those_that_a_docstring_names() -> None:
    text = "Qwen on v5e-4.\n\nHardware: v5p-64, v5e:4x4 or 2 x v5e-256; see v6e.\nTime: on v6e-8."
    assert experiments.slices(text) == ["v5p-64", "v5e:4x4", "2 x v5e-256"]
    named = {program.model for program in experiments.programs()}
    assert {"pretrain_72b", "pretrain_72b_v5e", "pretrain_57b_a14b", "pretrain_0_5b"} <= named


def test_default_mesh_of_inference_is_as_much_tensor_as_divides() -> None:
    program = program_of(Compile(model="qwen2.5-7b", topology="v5e-8", step="decode"))
    assert program.mesh == (("data", 2), ("tensor", 4))  # 28 heads


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Compile(topology="v5e-4"), "which model"),
        (Compile(model="qwen2.5-7b", experiment="pretrain_7b", topology="v5p-64"), "not both"),
        (Compile(experiment="pretrain_7b", topology="v5p-64", batch=4), "--batch is the experiment's own"),
        (Compile(model="qwen2.5-7b"), "--topology"),
        (Compile(model="qwen2.5-7b", topology="v5e-4", gpu="h200"), "either"),
        (Compile(model="qwen2.5-7b", topology="v5e-4", mesh="rows=4"), "rows=4"),
        (Compile(model="qwen2.5-7b", topology="v5e-4", mesh="fsdp=8"), "8 devices"),
        (Compile(model="nonsense", topology="v5e-4"), "nonsense"),
    ],
)
def test_impossible_options(options: Compile, said: str) -> None:
    with pytest.raises(InputError, match=said):
        program_of(options)


def test_help_is_fast() -> None:
    """It must not import jax."""
    code = "import sys; from qwen_jax.cli import run\ntry: run(['compile', '--help'])\n"
    code += "finally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stdout[-200:] + done.stderr[-2000:]


# --- the search -------------------------------------------------------------------------------------------------------


def test_meshes_of_a_search_fit_slice_and_model() -> None:
    program = Program("qwen2.5-7b", "v5e-16", "train", 16, 4096)
    found = list(meshes(program.config, program, parse_topology("v5e-16")))
    assert all(math.prod(sizes.values()) == 16 and sizes["expert"] == 1 for sizes in found)
    assert {sizes["tensor"] for sizes in found} == {1, 2, 4}  # 28 heads
    assert len(found) == len({tuple(sizes.values()) for sizes in found})


def test_search_begins_with_the_fastest() -> None:
    program = Program("qwen2.5-7b", "v5e-16", "train", 16, 4096)
    rates = [c.tokens_per_second for c in candidates(program, parse_topology("v5e-16"))]
    assert rates == sorted(rates, reverse=True)


def test_step_times_of_fsdp_by_hand() -> None:
    """Gathers forward, in recomputation and backward and one scatter of 2-byte weights, over 2 links of a 4x4."""
    program = Program("qwen2.5-7b", "v5e-16", "train", 16, 4096, (("fsdp", 16),))
    sizes = {"data": 1, "fsdp": 16, "tensor": 1, "context": 1, "expert": 1}
    compute, links = step_times(program.config, program, sizes, parse_topology("v5e-16"))
    assert links == pytest.approx(4 * 2 * 7_615_616_512 / (2 * 50e9), rel=1e-3)
    assert compute == pytest.approx(4 / 3 * 183.9e12 / 197e12, rel=1e-3)


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [*experiments.programs(), *TRAINING, *ADAPTERS, *SLICES, *DECODING, *PEERS],
    ids=lambda p: f"{label(p)}-{p.target}-{p.batch}-{p.sequence}-{p.weights}",
)
def test_rows_lie_on_their_slices(program: Program) -> None:
    """Mesh sizes multiply to the devices, and divide the batch and the model."""
    from qwen_jax.sharding import AXES, check_divides

    sizes = dict.fromkeys(AXES, 1) | dict(program.mesh)
    assert math.prod(sizes.values()) == parse_topology(program.target).num_devices
    check_divides(program.config, sizes)
    if program.step == "train":
        assert program.batch % (sizes["data"] * sizes["fsdp"] * sizes["expert"] * program.accumulate) == 0


def test_models_beside_maxtext_have_llamas_size() -> None:
    """8.03 and 68.98 billion parameters (arXiv 2407.21783, 2307.09288), and the biases that Qwen's form adds."""
    for program, parameters in ((PEERS[0], 8_030_261_248), (PEERS[2], 68_976_648_192)):
        config = load_config(program.model)
        biases = config.num_layers * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        assert config.num_params() - biases == parameters


def test_least_bytes_of_a_decode_step() -> None:
    """The arguments but for the embedding's table, of which one row is read."""
    program = Program("qwen2.5-7b", "v5e-1", "decode", 1, 4096, weights="int4")
    report = Report(program, parse_target("v5e-1"), Memory(6 * GIB, 0, 0, 0), None, None, (), 0.0, 0.0, {})
    assert report.least_hbm_bytes == 6 * GIB - 2 * 152064 * 3584


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", "nf4"])
def test_parameters_are_those_that_training_an_adapter_has(weights: str, tmp_path: Path) -> None:
    """The same leaves and shapes as of a model that is loaded, quantised and given an adapter."""
    from aot import programs
    from qwen_jax.model import init
    from qwen_jax.sharding import MeshConfig, make_mesh
    from train.adapter import AdapterConfig, adapted

    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 512}
    small = dataclasses.replace(load_preset("qwen2.5-7b"), vocab_size=320, num_layers=2, **sizes)
    (tmp_path / "config.json").write_text(json.dumps(small.to_hf()))
    program = Program(str(tmp_path), "v5e-1", "train", 1, 128, weights=weights, adapter=4)  # type: ignore[arg-type]
    config, mesh = program.config, make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    found = programs._with_adapter(program, programs._abstract_params(program, mesh, stacked=True), mesh)

    def quantised(path: Any, leaf: jax.Array) -> Any:
        keys = [key.key for key in path]
        num_in = 2 if keys[-2] == "o" else 1
        return programs._quantised(leaf, program.weights, num_in) if keys[-1] == "kernel" else leaf

    params = jax.jit(lambda key: init(config, key, jnp.bfloat16))(jax.random.key(0))
    params["layers"] = jax.tree_util.tree_map_with_path(quantised, params["layers"])
    wanted = adapted(AdapterConfig(rank=4), config, params, seed=0)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (found, wanted)]
    assert shapes[0] == shapes[1]
    codes = jax.tree.leaves(found["layers"]["mlp"]["gate"]["kernel"].base)[0]
    assert math.prod(codes.sharding.shard_shape(codes.shape)) == codes.size // 4  # over all devices


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (Program("qwen2.5-7b", "v5e-1", "train", 1, 128, weights="int4"), "give an --adapter"),
        (Program("qwen2.5-7b", "v5e-1", "train", 1, 128, cache_dtype="int8"), "--cache-dtype"),
        (Program("qwen2.5-7b", "v5e-1", "decode", 1, 128, adapter=4), "--adapter"),
    ],
)
def test_what_no_program_is(program: Program, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(program)


def test_json_of_a_refusal() -> None:
    program = Program("qwen2.5-7b", "v5e-4", "train", 4, 4096, (("fsdp", 4),))
    plain = json.loads(json.dumps(report_of(program, EARLY).as_json()))
    assert not plain["fits"] and plain["problems"] and plain["out_of_memory"]["early"]
