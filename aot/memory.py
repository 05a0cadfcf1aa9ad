"""What the compiler says of memory: what fits, and, where it does not, what the largest allocations are."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from aot import hlo

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT]?)"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip's HBM, as the compiler has laid it out. Outputs that reuse arguments are not counted twice."""

    arguments: int
    outputs: int
    temporaries: int
    code: int
    host: int = 0  # of the host's memory

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One allocation: its bytes, shape and where in the program it comes from."""

    num_bytes: int
    shape: str
    name: str


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """The compiler's refusal: what the program needs and what the chip has, in bytes.

    An early refusal comes before scheduling and is an estimate (docs/tpu.md); it names no allocations.
    """

    needed: int
    available: int
    early: bool
    allocations: tuple[Allocation, ...] = ()


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """The refusal that a compiler's error message says; None where it says something else."""
    if early := re.search(rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", message):
        return OutOfMemory(_bytes(early[1], early[2]), _bytes(early[3], early[4]), early=True)
    if late := re.search(rf"Used {_SIZE} of {_SIZE} hbm", message):
        return OutOfMemory(_bytes(late[1], late[2]), _bytes(late[3], late[4]), False, _listed_allocations(message))
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def _listed_allocations(message: str) -> tuple[Allocation, ...]:
    """The allocations that a late refusal lists."""
    found = []
    for block in re.split(r"\n\s+\d+\. Size: ", message)[1:]:
        size = re.match(_SIZE, block)
        shape = re.search(r"Shape: (\S+?)[{\s]", block)
        name = re.search(r'op_name="([^"]*)"', block) or re.search(r"XLA label: (\S+)", block)
        if size and shape:
            found.append(Allocation(_bytes(size[1], size[2]), shape[1], name[1] if name else ""))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of HBM in a buffer assignment, with the largest value that lives in it at some time."""

    allocation: Allocation
    is_temporary: bool
    elements: int


def blocks(buffer_assignment: str, module: hlo.Module) -> list[Block]:
    """All blocks of HBM, the largest first, each named by an operation of the JAX program where one is known."""
    names = {i.name: i.op_name for computation in module.computations.values() for i in computation.values()}
    found: dict[tuple[str, int], tuple[tuple[int, bool], Block]] = {}
    allocation, in_hbm, temporary = "", False, False
    for line in buffer_assignment.splitlines():
        if header := re.match(r"allocation (\d+): size \d+, (color [1-9])?", line):
            allocation, in_hbm, temporary = header[1], header[2] is None, "preallocated-temp" in line
        elif in_hbm and (value := re.match(r" value: <\d+ ([^\s{]+).*\(size=(\d+),offset=(\d+)\): (\S+?)[{\s]", line)):
            size, op_name = int(value[2]), names.get(value[1], "")
            rank, place = (size, bool(op_name)), (allocation, int(value[3]))
            if place not in found or rank > found[place][0]:
                dims = [int(d) for d in re.findall(r"\d+", value[4].partition("[")[2])]
                named = Allocation(size, value[4], op_name or value[1])
                found[place] = rank, Block(named, temporary, math.prod(dims))
    return sorted((block for _, block in found.values()), key=lambda block: -block.allocation.num_bytes)


def second_copies(found: Sequence[Block], module: hlo.Module) -> list[Allocation]:
    """Temporary blocks as large as a layer's cache, or, wider, as a matrix of few bits: of each there should be one."""
    parameters = [i for i in module.computations[module.entry].values() if i.opcode == "parameter" and i.arrays]
    caches = {math.prod(i.arrays[0].dims) for i in parameters if "cache." in i.op_name and len(i.arrays[0].dims) > 3}
    matrices = {math.prod(i.arrays[0].dims) for i in parameters if i.arrays[0].dtype in ("s4", "s8")}

    def is_copy(block: Block) -> bool:
        wide = block.allocation.shape.startswith(("bf16", "f16", "f32"))
        return block.elements in (caches | matrices if wide else caches)

    return [block.allocation for block in found if block.is_temporary and is_copy(block)]
