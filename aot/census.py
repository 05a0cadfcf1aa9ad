"""Census of a program's collectives: kind, mesh axes, count, bytes, time on the links, and how much compute hides."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from aot import hlo
from aot.chips import Topology

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind over the same mesh axes, in one run of the program.

    bytes_sent is what each chip sends. link_seconds is that at the published rate of the links that the group can use;
    hidden_seconds the part during which the schedule has compute to run, each operation at the chip's peak.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes_sent: int
    link_seconds: float
    hidden_seconds: float
    largest: str
    source: str  # operation of the JAX program that the largest belongs to

    @property
    def exposed_seconds(self) -> float:
        return self.link_seconds - self.hidden_seconds


@dataclasses.dataclass(frozen=True)
class Census:
    """What one run of a program does, per chip: totals over all executions of every operation.

    flops: of matrix products and declared by kernels. hbm_bytes: read and written. compute_seconds: the sum over
    operations of what each needs at the chip's peak or at the HBM's bandwidth, whichever is longer. estimated_seconds:
    the compiler's own cycle estimate, without kernels, copies and collectives (docs/tpu.md says how far it is off).
    kernels: number of runs of each Pallas kernel; unpriced_kernels: of those that declare no cost.
    """

    collectives: tuple[Collectives, ...]
    flops: float
    hbm_bytes: float
    compute_seconds: float
    estimated_seconds: float
    kernels: Mapping[str, int]
    unpriced_kernels: int

    @property
    def link_seconds(self) -> float:
        return sum(c.link_seconds for c in self.collectives)

    @property
    def exposed_seconds(self) -> float:
        return sum(c.exposed_seconds for c in self.collectives)

    @property
    def bytes_sent(self) -> int:
        return sum(c.bytes_sent for c in self.collectives)

    def over(self, kind: str, axis: str) -> int:
        """Bytes that each chip sends in collectives of `kind` over mesh axes of which `axis` is one."""
        return sum(c.bytes_sent for c in self.collectives if c.kind == kind and axis in c.axes)


# --- The wires --------------------------------------------------------------------------------------------------------


Link = tuple[int, ...]  # coordinates of a chip, side along which the link leads, and +1 or -1


class Wires:
    """Where each partition of the program lies in the slice, and in the logical mesh."""

    def __init__(
        self,
        topology: Topology,
        mesh: Mapping[str, int],
        coordinates: Sequence[Sequence[int]],
        slices: Sequence[int] | None = None,
    ) -> None:
        """`coordinates`, and `slices`: where the chip lies, and in which slice, that runs partition i, which is element
        i of the mesh in row-major order."""
        self.topology, self.mesh = topology, dict(mesh)
        self.slices = slices or [0] * len(coordinates)
        self.coordinates = [tuple(c)[: len(topology.shape)] for c in coordinates]
        self._indices = list(itertools.product(*(range(size) for size in mesh.values())))

    def axes(self, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """Names of the mesh axes along which members of a group differ."""
        differ = set()
        for group in groups:
            columns = zip(*(self._indices[member] for member in group), strict=True)
            differ |= {i for i, column in enumerate(columns) if len(set(column)) > 1}
        return tuple(name for i, name in enumerate(self.mesh) if i in differ)

    def crosses(self, group: Sequence[int]) -> bool:
        """Whether members lie in different slices."""
        return len({self.slices[member] for member in group}) > 1

    def group_bandwidth(self, group: Sequence[int]) -> float:
        """Bytes per second that every member can send and receive at once: 2 links a side that is a ring, else 1.

        Of a group in several slices, its chip's share of the data centre's network.
        """
        if self.topology.chip.is_gpu:
            return self.topology.chip.link_bandwidth
        if self.crosses(group):
            return self.topology.chip.dcn_bandwidth
        links = 0
        for side, ring, values in zip(
            self.topology.shape,
            self.topology.rings,
            zip(*(self.coordinates[member] for member in group), strict=True),
            strict=True,
        ):
            spread = len(set(values))
            if spread > 1:
                links += 2 if ring and spread == side and side > 2 else 1
        return max(links, 1) * self.topology.chip.link_bandwidth

    def all_to_all_seconds(self, group: Sequence[int], num_bytes: float) -> float:
        """Time in which every member sends `num_bytes` in equal parts to all, limited by the narrowest cut."""
        if self.topology.chip.is_gpu or self.crosses(group):
            return num_bytes / self.group_bandwidth(group)
        slowest = 0.0
        for side, ring, values in zip(
            self.topology.shape,
            self.topology.rings,
            zip(*(self.coordinates[member] for member in group), strict=True),
            strict=True,
        ):
            spread = len(set(values))
            if spread > 1:
                cut = 8 if ring and spread == side and side > 2 else 4
                slowest = max(slowest, spread * num_bytes / cut / self.topology.chip.link_bandwidth)
        return slowest or num_bytes / self.topology.chip.link_bandwidth

    def route(self, pairs: Sequence[tuple[int, int]]) -> dict[Link, int]:
        """How many of the messages source -> target each link carries, every message routed side by side."""
        if self.topology.chip.is_gpu:
            return {(source,): 1 for source, _ in pairs}
        load: dict[Link, int] = {}
        for source, target in pairs:
            at, goal = list(self.coordinates[source]), self.coordinates[target]
            for d, (side, ring) in enumerate(zip(self.topology.shape, self.topology.rings, strict=True)):
                ahead = (goal[d] - at[d]) % side
                step = 1 if (ahead <= side // 2 if ring else goal[d] > at[d]) else -1
                while at[d] != goal[d]:
                    link = (*at, d, step)
                    load[link] = load.get(link, 0) + 1
                    at[d] = (at[d] + step) % side
        return load


def replica_groups(attributes: str, num_partitions: int) -> list[list[int]]:
    """Groups of partitions of a collective, in any of the three ways in which HLO writes them."""
    everyone = [list(range(num_partitions))]
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims = [int(d) for d in match[3].split(",")]
        order = [int(p) for p in match[4].split(",")] if match[4] else list(range(len(dims)))
        flat = _transposed(dims, order)
        size = int(match[2])
        return [flat[i : i + size] for i in range(0, len(flat), size)]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        return _mesh_groups(sizes, match[2]) if "device_ids" not in match[1] else everyone
    return everyone


def _mesh_groups(sizes: dict[str, int], grouped: str) -> list[list[int]]:
    """Groups along some axes of a row-major mesh; `'axis':(2)4` is the part of 4 of an axis behind a part of 2."""
    dims: list[int] = []
    within: list[bool] = []
    parts = {
        name: (part, int(size))
        for name, part, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))", grouped)
        for size in [size]
    }
    names = re.findall(r"'([^']+)'", grouped)
    for name, size in sizes.items():
        if name in parts:
            before, length = int(parts[name][0]), parts[name][1]
            split = [(before, False), (length, True), (size // before // length, False)]
        else:
            split = [(size, name in names)]
        dims += [length for length, _ in split]
        within += [inside for _, inside in split]
    order = [i for i, inside in enumerate(within) if not inside] + [i for i, inside in enumerate(within) if inside]
    flat = _transposed(dims, order)
    size = math.prod(d for d, inside in zip(dims, within, strict=True) if inside)
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def _transposed(dims: Sequence[int], order: Sequence[int]) -> list[int]:
    """0, 1, 2, ... as an array of `dims`, its axes put in `order`, read row by row."""
    strides = [math.prod(dims[d + 1 :]) for d in range(len(dims))]
    ranges = (range(dims[d]) for d in order)
    return [sum(i * strides[d] for i, d in zip(index, order, strict=True)) for index in itertools.product(*ranges)]


# --- The collectives --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Collective:
    """One collective instruction: what it is, what it moves, and for how long."""

    kind: str
    axes: tuple[str, ...]
    bytes_sent: int
    seconds: float
    largest: hlo.Array | None
    channel: str
    source: str
    pairs: tuple[tuple[int, int], ...] = ()  # of a permutation; transfers with the same pairs wait for each other


class _Reader:
    def __init__(self, module: hlo.Module, wires: Wires) -> None:
        self.module, self.wires = module, wires

    def collective(
        self, computation: hlo.Computation, instruction: hlo.Instruction, fused: bool = False
    ) -> _Collective | None:
        """What the instruction moves, if it is a collective or holds one."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            # XLA:TPU writes a reduce-scatter as the fusion of an all-reduce and of each chip's slice of the sum
            users = computation.users.get(instruction.name, ())
            scattered = fused and bool(users) and all(user.opcode == "dynamic-slice" for user in users)
            kind = "reduce-scatter" if kind == "all-reduce" and scattered else kind
            return self._read(computation, instruction, kind, scattered)
        if instruction.opcode in ("fusion", "async-start"):
            inner = self.module.computations.get(instruction.called("calls") or "", hlo.Computation())
            for wrapped in inner.values():
                found = self.collective(inner, wrapped, instruction.opcode == "fusion")
                if found:
                    return found
        return None

    def _read(
        self, computation: hlo.Computation, instruction: hlo.Instruction, kind: str, scattered: bool
    ) -> _Collective:
        wires = self.wires
        started = instruction.opcode.endswith("-start")
        arrays = [array for array in instruction.arrays if array.dims]
        total = sum(array.num_bytes for array in arrays)
        largest = max(arrays, key=lambda array: array.num_bytes, default=None)
        channel = found[0] if (found := re.search(r"channel_id=\d+", instruction.attributes)) else instruction.name
        source = instruction.op_name
        if kind == "collective-permute":
            size = total // 2 if started else total
            text = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
            pairs = tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", text[1])) if text else ()
            moved = tuple(pair for pair in pairs if pair[0] != pair[1])
            seconds = size * max(self.route(moved).values(), default=0) / wires.topology.chip.link_bandwidth
            if any(wires.crosses(pair) for pair in moved):
                seconds = size / wires.topology.chip.dcn_bandwidth
            return _Collective(kind, wires.axes(moved), size, seconds, largest, channel, source, moved)
        groups = replica_groups(instruction.attributes, len(wires.coordinates))
        n = len(groups[0])
        if kind == "all-gather":
            sent = (total * n // (n + 1) if started else total) * (n - 1) // n
        elif scattered:
            sent = total * (n - 1) // n
        elif kind == "reduce-scatter":
            sent = (total // (n + 1) if started else total) * (n - 1)
        elif kind == "all-reduce":
            sent = 2 * total * (n - 1) // n
        elif kind == "ragged-all-to-all":
            # what travels fills the smaller of both buffers; the other has room for the worst case
            buffers = [computation[name].arrays[0].num_bytes for name in instruction.operands[:2]]
            sent = min(buffers) * (n - 1) // n
        else:
            sent = (total // 2 if started else total) * (n - 1) // n
        if kind in ("all-to-all", "ragged-all-to-all"):
            seconds = wires.all_to_all_seconds(groups[0], sent)
        else:
            seconds = sent / wires.group_bandwidth(groups[0])
        return _Collective(kind, wires.axes(groups), sent, seconds, largest, channel, source)

    @functools.lru_cache(maxsize=256)  # noqa: B019 (a reader lives as long as one census)
    def route(self, pairs: tuple[tuple[int, int], ...]) -> dict[Link, int]:
        return self.wires.route(pairs)


def census(module: hlo.Module, wires: Wires, filled_rows: float = 1.0) -> Census:
    """Census of one run of `module`. Transfers wait for those before them on the same links and block at their end.

    filled_rows: share of the rows of grouped products that are computed; the others are room for the worst case.
    """
    chip, reader = wires.topology.chip, _Reader(module, wires)
    records: list[tuple[_Collective, int, float]] = []  # collective, executions, exposed seconds of each
    totals = {"flops": 0.0, "hbm": 0.0, "compute": 0.0, "cycles": 0.0}
    kernels: dict[str, int] = {}
    unpriced = 0

    def flops_of(computation: hlo.Computation, instruction: hlo.Instruction) -> float:
        grouped = instruction.name.startswith("ragged-dot")
        return hlo.flops(module, computation, instruction) * (filled_rows if grouped else 1)

    by_computation: dict[tuple[str, int], None] = {}
    for instruction, name, executions in hlo.scheduled(module):
        by_computation.setdefault((name, executions))
        computation = module.computations[name]
        flops = flops_of(computation, instruction)
        traffic = hlo.hbm_traffic(module, computation, instruction)
        totals["flops"] += executions * flops
        totals["hbm"] += executions * traffic
        totals["compute"] += executions * max(flops / chip.peak_flops, traffic / chip.hbm_bandwidth)
        totals["cycles"] += executions * instruction.estimated_cycles
        if re.search(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton)"', instruction.attributes):
            kernel = re.sub(r"[.\d]+$", "", instruction.name)
            kernels[kernel] = kernels.get(kernel, 0) + executions
            unpriced += executions if not flops else 0

    for name, executions in by_computation:
        computation = module.computations[name]
        found, ends = _transfers(reader, computation)
        clock, free = 0.0, dict[tuple, float]()
        pending: dict[str, tuple[_Collective, float]] = {}
        for instruction in computation.values():
            if instruction.name in ends and ends[instruction.name] in pending:
                collective, finish = pending.pop(ends[instruction.name])
                exposed = max(0.0, finish - clock)
                clock += exposed
                records.append((collective, executions, exposed))
            elif instruction.name in found:
                collective = found[instruction.name]
                finish = free[collective.pairs] = max(clock, free.get(collective.pairs, 0.0)) + collective.seconds
                if instruction.name in ends.values():
                    pending[instruction.name] = (collective, finish)
                else:
                    records.append((collective, executions, finish - clock))
                    clock = finish
            flops = flops_of(computation, instruction)
            traffic = hlo.hbm_traffic(module, computation, instruction)
            if instruction.name not in found or flops:
                clock += max(flops / chip.peak_flops, traffic / chip.hbm_bandwidth)

    merged: dict[tuple[str, tuple[str, ...]], list[tuple[_Collective, int, float]]] = {}
    for record in records:
        merged.setdefault((record[0].kind, record[0].axes), []).append(record)
    collectives = [_merge(reader, kind, axes, group) for (kind, axes), group in merged.items()]
    return Census(
        collectives=tuple(sorted(collectives, key=lambda c: -c.link_seconds)),
        flops=totals["flops"],
        hbm_bytes=totals["hbm"],
        compute_seconds=totals["compute"],
        estimated_seconds=totals["cycles"] / chip.clock,
        kernels=kernels,
        unpriced_kernels=unpriced,
    )


def _transfers(reader: _Reader, computation: hlo.Computation) -> tuple[dict[str, _Collective], dict[str, str]]:
    """Collectives by the name of the instruction that starts them; and, by what waits for one, the name of its start.

    What waits is a -done after its -start, or, where XLA fuses a transfer with the compute that hides it, the last of
    the instructions with the same channel.
    """
    found: dict[str, _Collective] = {}
    ends: dict[str, str] = {}
    channels: dict[str, list[str]] = {}
    for instruction in computation.values():
        if instruction.opcode.endswith("-done") and instruction.operands[0] in found:
            ends[instruction.name] = instruction.operands[0]
        elif collective := reader.collective(computation, instruction):
            # only what is fused has a channel of its own
            names = channels.setdefault(collective.channel if instruction.opcode == "fusion" else instruction.name, [])
            names.append(instruction.name)
            if len(names) == 1:
                found[instruction.name] = collective
    ends |= {names[-1]: names[0] for names in channels.values() if len(names) > 1}
    return found, ends


def _merge(
    reader: _Reader, kind: str, axes: tuple[str, ...], records: Sequence[tuple[_Collective, int, float]]
) -> Collectives:
    """The sum of (collective, executions, exposed seconds of each)."""
    largest = max((c for c, _, _ in records), key=lambda c: c.largest.num_bytes if c.largest else 0)
    if kind == "collective-permute":  # the two directions of a ring are different links and run at once
        load: dict[Link, int] = {}
        for collective, executions, _ in records:
            for link, messages in reader.route(collective.pairs).items():
                load[link] = load.get(link, 0) + messages * executions * collective.bytes_sent
        seconds = max(load.values(), default=0) / reader.wires.topology.chip.link_bandwidth
    else:
        seconds = sum(c.seconds * executions for c, executions, _ in records)
    return Collectives(
        kind,
        axes,
        count=sum(executions for _, executions, _ in records),
        bytes_sent=sum(c.bytes_sent * executions for c, executions, _ in records),
        link_seconds=seconds,
        hidden_seconds=max(0.0, seconds - sum(exposed * executions for _, executions, exposed in records)),
        largest=str(largest.largest or ""),
        source=largest.source,
    )
