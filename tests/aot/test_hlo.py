"""The reader of compiled programs, on programs that libtpu 0.0.51 compiled (data) and on lines of HLO.

Each saved program is one update of y = x + tanh(x w1) w2 over 4 layers in a scan with rematerialisation, w1 [D, 4D] and
w2 [4D, D] split by FSDP, 2048 tokens a chip. What it must compute and move is a closed form.
"""

import gzip
import json
from pathlib import Path

import pytest

from aot import hlo
from aot.census import Census, Wires, census, replica_groups
from aot.chips import parse_topology

DATA = Path(__file__).parent / "data"
LAYERS, TOKENS = 4, 2048


def load(name: str) -> tuple[hlo.Module, Census, int]:
    """The saved program, its census and its width D."""
    saved = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
    module = hlo.parse(saved["hlo"])
    wires = Wires(parse_topology(saved["topology"]), saved["mesh"], saved["coordinates"])
    return module, census(module, wires), saved["width"]


def sent(found: Census, kind: str, *axes: str) -> int:
    return sum(c.bytes_sent for c in found.collectives if c.kind == kind and c.axes == axes)


@pytest.mark.parametrize("name", ["windowed", "trap", "fused", "scattered"])
def test_flops_are_those_of_the_model(name: str) -> None:
    """Two products forward, one again, four backward, in every layer; whatever XLA made of them."""
    _, found, width = load(name)
    assert found.flops == LAYERS * 7 * 2 * width * 4 * width * TOKENS


def test_trip_counts_of_nested_loops() -> None:
    """Layers, and in them the steps of a windowed einsum: 16 shards, two in each direction a step."""
    module, _, _ = load("windowed")
    trips = {
        (name == module.entry, hlo.trip_count(module, module.computations[name], instruction))
        for instruction, name, _ in hlo.scheduled(module)
        if instruction.opcode == "while"
    }
    assert trips == {(True, LAYERS), (False, 4)}


def test_trap_of_one_fsdp_axis_over_a_whole_torus() -> None:
    """Weights are gathered twice and gradients summed by full all-reduces: four times the bytes that are needed."""
    _, found, width = load("trap")
    matrix = 2 * 4 * width * width
    assert sent(found, "all-reduce", "fsdp") == pytest.approx(LAYERS * 2 * 3 * 2 * matrix * 63 / 64, rel=1e-3)
    assert found.over("all-gather", "fsdp") == found.over("reduce-scatter", "fsdp") == 0


def test_fused_reduce_scatter_is_no_all_reduce() -> None:
    _, found, width = load("scattered")
    matrix = 2 * 4 * width * width
    assert sent(found, "all-gather", "fsdp") == LAYERS * 2 * 2 * matrix * 31 // 32
    assert sent(found, "reduce-scatter", "fsdp") == LAYERS * 2 * matrix * 31 // 32
    # each shard's sum over the replicas
    assert sent(found, "all-reduce", "data") == LAYERS * 2 * 2 * (matrix // 32) * 3 // 4


def test_fused_gathers_count_once_and_hide_under_their_compute() -> None:
    """XLA fuses a gather with the product before it: start, product and end all name the same collective."""
    _, found, width = load("fused")
    matrix = 2 * 4 * width * width
    (gathers,) = [c for c in found.collectives if c.kind == "all-gather"]
    assert (gathers.count, gathers.bytes_sent) == (LAYERS * 2 * 2, LAYERS * 2 * 2 * matrix * 255 // 256)
    assert gathers.hidden_seconds == pytest.approx(gathers.link_seconds / 2)
    (reduces,) = [c for c in found.collectives if c.kind == "all-reduce"]
    assert reduces.hidden_seconds == pytest.approx(0, abs=1e-12)


def test_windowed_einsum_hides_its_permutations() -> None:
    _, found, _ = load("windowed")
    (permutes,) = [c for c in found.collectives if c.kind == "collective-permute"]
    assert permutes.axes == ("fsdp",)
    assert permutes.hidden_seconds > 0.9 * permutes.link_seconds
    # both directions of the ring at once
    assert permutes.link_seconds < 0.6 * permutes.bytes_sent / 50e9


def test_traffic_counts_the_slice_of_a_stacked_weight() -> None:
    """A lower bound that is close: the gathered matrices, written and read, and the activations of each product."""
    _, found, width = load("scattered")
    gathered = LAYERS * 2 * 2 * 2 * (2 * 4 * width * width)
    assert gathered < found.hbm_bytes < 3 * gathered


def test_what_crosses_slices_goes_at_the_networks_rate() -> None:
    """Two slices of 4 chips: data over both, fsdp within one; 1 MB summed over each."""
    topology = parse_topology("2 x v5e:2x2")
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    wires = Wires(topology, {"data": 2, "fsdp": 4}, corners * 2, [0] * 4 + [1] * 4)
    text = """ENTRY %main (x: f32[250000]) -> f32[250000] {
  %x = f32[250000]{0} parameter(0)
  %inner = f32[250000]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, channel_id=1
  ROOT %outer = f32[250000]{0} all-reduce(%inner), replica_groups={{0,4},{1,5},{2,6},{3,7}}, channel_id=2
}
"""
    found = {c.axes: c for c in census(hlo.parse(text), wires).collectives}
    assert found["fsdp",].link_seconds == pytest.approx(2 * 1e6 * 3 / 4 / (2 * 50e9))
    assert found["data",].link_seconds == pytest.approx(1e6 / 3.125e9)


def test_rounds_that_a_step_does_not_enter_count_as_none() -> None:
    """A loop whose length depends on data runs once, but for the further rounds of a mixture."""
    loop = """%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %s = (s32[], f32[8]) parameter(0)
}
%condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]) parameter(0)
  ROOT %go = pred[] custom-call(%t), custom_call_target="go"
}
ENTRY %main (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%x), condition=%condition, body=%body, metadata={op_name="jit(f)/NAME/while"}
}
"""
    for name, executions in (("decode", 1), (hlo.FURTHER_ROUNDS, 0)):
        ran = {instruction.name: n for instruction, _, n in hlo.scheduled(hlo.parse(loop.replace("NAME", name)))}
        assert ran["s"] == executions


# --- lines of HLO -----------------------------------------------------------------------------------------------------


def flops_of(lines: str) -> int:
    module = hlo.parse("ENTRY %main () -> f32[] {\n" + lines + "\n}\n")
    computation = module.computations["main"]
    return sum(hlo.flops(module, computation, instruction) for instruction in computation.values())


def test_flops_of_a_dot() -> None:
    assert (
        flops_of("""
  %a = bf16[8,64,32]{2,1,0} parameter(0)
  %b = bf16[8,32,16]{2,1,0} parameter(1)
  ROOT %dot.1 = bf16[8,64,16]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}
""")
        == 2 * 8 * 64 * 16 * 32
    )


def test_flops_of_a_batched_product_written_as_a_convolution() -> None:
    """XLA:TPU makes a batch axis spatial: dilated by its size, so that every output reads one tap."""
    window = "window={size=8 pad=0_0 stride=7 lhs_dilate=8}"
    assert (
        flops_of(f"""
  %a = bf16[8,64,32]{{2,1,0}} parameter(0)
  %b = bf16[8,32,16]{{2,1,0}} parameter(1)
  ROOT %c = bf16[8,64,16]{{2,1,0}} convolution(%a, %b), {window}, dim_labels=0bf_0io->0bf
""")
        == 2 * 8 * 64 * 16 * 32
    )


def test_flops_of_a_kernel_are_declared() -> None:
    assert flops_of("""
  ROOT %k = bf16[8]{0} custom-call(), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234","transcendentals":"5"}}}
""") == 1234  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(("kernel", "products"), [("flash_forward", 2), ("flash_backward", 5), ("flash_d_key", 4)])
@pytest.mark.parametrize("q", ["bf16[1,2,4,7,128,512]", "bf16[1,2,4,7,512,128]", "bf16[1,2,512,28,128]"])
def test_flops_of_flash_attention_are_causal(kernel: str, products: int, q: str) -> None:
    """Its grid depends on how texts are packed, so it declares nothing; q lies in one of three orders."""
    shapes = f"operand_layout_constraints={{s32[40]{{0}}, {q}{{4,3,2,1,0}}, bf16[2,4,512,128]{{3,2,1,0}}}}"
    metadata = f'metadata={{op_name="jit(step)/shard_map/{kernel}/pallas_call"}}'
    pairs = 512 * 513 // 2
    line = f'  ROOT %k = bf16[8]{{0}} custom-call(), custom_call_target="tpu_custom_call", {shapes}, {metadata}'
    assert flops_of(line) == products * 2 * 2 * 28 * 128 * pairs


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,3]<=[6]", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=[3,2]<=[2,3]T(1,0)", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=6] {'a':(2)3}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_replica_groups(written: str, groups: list[list[int]]) -> None:
    assert replica_groups(f"channel_id=1, {written}, dimensions={{0}}", 6) == groups


def test_memory_space_and_size_of_a_result() -> None:
    text = "ENTRY %main () -> f32[] {\n  ROOT %x = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s4[6]{0}, f32[]) fusion()\n}\n"
    arrays = hlo.parse(text).computations["main"]["x"].arrays
    assert [(array.num_bytes, array.space) for array in arrays] == [(64, 1), (3, 0), (4, 0)]


def test_text_without_a_program() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("not HLO")


# --- the wires --------------------------------------------------------------------------------------------------------


def box(topology: str) -> Wires:
    """Devices in row-major order of their coordinates, along one mesh axis."""
    slice_ = parse_topology(topology)
    coordinates: list[list[int]] = [[]]
    for side in slice_.shape:
        coordinates = [[*c, i] for c in coordinates for i in range(side)]
    return Wires(slice_, {"fsdp": len(coordinates)}, coordinates)


@pytest.mark.parametrize(
    ("topology", "group", "links"),
    [
        ("v5e:4x4", range(4), 1),  # a line: its end has one link
        ("v5e:4x4", range(16), 2),
        ("v5e:16x16", range(16), 2),  # a ring
        ("v5e:16x16", range(256), 4),
        ("v5e:16x16", range(8), 1),  # half a ring
        ("v5p:2x2x2", range(8), 3),
        ("v5p:4x4x4", range(64), 6),
        ("v5p:4x4x8", range(0, 128, 8), 4),
    ],
)
def test_links_of_a_group(topology: str, group: range, links: int) -> None:
    wires = box(topology)
    assert wires.group_bandwidth(list(group)) == links * wires.topology.chip.link_bandwidth


def test_routes_of_a_shift() -> None:
    """Neighbours on a ring use each link once; a line's last message goes back over all the others' links."""
    ring, line = box("v5e:16x16"), box("v5e:4x4")
    assert set(ring.route([(i, (i + 1) % 16) for i in range(16)]).values()) == {1}
    assert max(ring.route([(i, (i + 2) % 16) for i in range(16)]).values()) == 2
    loads = line.route([(0, 1), (1, 2), (2, 3), (3, 0)])
    assert sorted(loads.values()) == [1] * 6  # three links one way, and the same three back


def test_all_to_all_is_limited_by_the_cut() -> None:
    """16 chips in a ring: half of them send half of their bytes across two cuts of one link each way."""
    wires = box("v5e:16x16")
    assert wires.all_to_all_seconds(list(range(16)), 100e9) == pytest.approx(8 * 50e9 / (2 * 50e9))


def test_ragged_exchange_and_grouped_product_count_the_rows_that_there_are() -> None:
    """Two exchanges of one channel, to a buffer eight times as large and back, and a product over that buffer."""
    module = hlo.parse("""ENTRY %main () -> f32[] {
  %rows = bf16[64,32]{1,0} parameter(0)
  %room = bf16[512,32]{1,0} parameter(1)
  %sent = bf16[512,32]{1,0} ragged-all-to-all(%rows, %room), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  %ragged-dot-none.1 = f32[512,16]{1,0} custom-call(%sent), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"800"}}}
  ROOT %back = bf16[64,32]{1,0} ragged-all-to-all(%sent, %rows), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
}
""")  # noqa: E501
    found = census(module, Wires(parse_topology("v5p:2x2x2"), {"expert": 8}, box("v5p:2x2x2").coordinates), 1 / 8)
    assert sent(found, "ragged-all-to-all", "expert") == 2 * 64 * 32 * 2 * 7 // 8
    assert [c.count for c in found.collectives] == [2]
    assert found.flops == 100


def test_mesh_axes_of_groups() -> None:
    slice_ = parse_topology("v5e:2x2")
    wires = Wires(slice_, {"fsdp": 2, "tensor": 2}, [(0, 0), (0, 1), (1, 0), (1, 1)])
    assert wires.axes([[0, 1], [2, 3]]) == ("tensor",)
    assert wires.axes([[0, 2], [1, 3]]) == ("fsdp",)
    assert wires.axes([[0, 1, 2, 3]]) == ("fsdp", "tensor")
