"""Reads the scheduled HLO of a compiled TPU program: what runs, how often, and what it costs.

The compiler's own cost analysis counts a loop's body once; here every figure is multiplied by the loop's trip count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from qwen_jax.layers.sharded_experts import FURTHER_ROUNDS

# --- Text -> instructions ---------------------------------------------------------------------------------------------

_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_ITEM_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = (.*)")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result. Memory space 0 is HBM."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def num_bytes(self) -> int:
        bits = 8 if self.dtype.startswith("f8") else _ITEM_BITS.get(self.dtype, 0)
        return math.prod(self.dims) * bits // 8

    @property
    def hbm_bytes(self) -> int:
        return self.num_bytes if self.space == 0 else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `name = shape opcode(operands), attributes`."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, a tuple's in order."""
        found = []
        for dtype, dims, layout in _ARRAY.findall(self.shape):
            space = _MEMORY_SPACE.search(layout)
            found.append(Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0))
        return tuple(found)

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        return sum(array.hbm_bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Where in the JAX program the operation comes from, such as `jit(step)/while/body/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def estimated_cycles(self) -> int:
        """The compiler's own estimate; 0 for what it does not estimate (kernels, collectives, copies)."""
        return int(found[1]) if (found := re.search(r'"estimated_cycles":"(\d+)"', self.attributes)) else 0

    def called(self, attribute: str) -> str | None:
        """Name of the computation that `attribute` names."""
        return found[1] if (found := re.search(rf"\b{attribute}=%?([^\s,}}]+)", self.attributes)) else None


class Computation(dict[str, Instruction]):
    """Instructions by name, in order (of execution, in a scheduled module)."""

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.values() if i.is_root), list(self.values())[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Module of scheduled HLO text. Raises ValueError when there is no entry computation in it."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations.setdefault(match[2], Computation())
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; it is not an HLO module")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    root, name, rest = match.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    call = re.match(r"\s*([a-z][a-z0-9\-]*)\(", rest[end:])
    if not call:
        return None
    start = end + call.end()
    stop = _closing(rest, start - 1)
    arguments = rest[start:stop]
    operands = tuple(re.findall(r"%([^\s,)]+)", arguments))
    return Instruction(name, call[1], rest[:end], operands, arguments, rest[stop + 1 :], bool(root))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.start()
    return len(text) - 1


# --- What runs, how often ---------------------------------------------------------------------------------------------


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, from its counter's start, bound and step; None if it depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (module.computations[loop.called(name) or ""] for name in ("condition", "body"))
    compare, operands = _compare(module, condition)
    if compare is None:
        return None
    initial = caller.get(loop.operands[0])

    def index(name: str) -> int | None:
        """Which element of the loop's state an operand of the condition is."""
        instruction = _through_copies(condition, name)
        if instruction is None or instruction.opcode != "get-tuple-element":
            return None
        return _tuple_index(instruction)

    def start(k: int | None) -> int | None:
        if k is None or initial is None or initial.opcode != "tuple":
            return None
        return _constant(caller, initial.operands[k])

    counter = index(operands[0])
    bound = _constant(condition, operands[1])
    bound = start(index(operands[1])) if bound is None else bound
    first = start(counter)
    if counter is None or bound is None:
        return None
    trips = (bound - (first or 0)) / _step(module, body, counter)
    return max(math.floor(trips) + 1 if "direction=LE" in compare.attributes else math.ceil(trips), 0)


def _compare(module: Module, condition: Computation) -> tuple[Instruction | None, tuple[str, ...]]:
    """The comparison that ends a loop, and its operands as names in the condition itself."""
    root = condition.root
    if root.opcode == "fusion":
        inner = module.computations[root.called("calls") or ""]
        if inner.root.opcode != "compare":
            return None, ()
        numbers = {parameter.name: i for i, parameter in inner.parameters.items()}
        names = []
        for operand in inner.root.operands:
            if operand not in numbers:
                return None, ()
            names.append(root.operands[numbers[operand]])
        return inner.root, tuple(names)
    return (root, root.operands) if root.opcode == "compare" else (None, ())


def _through_copies(computation: Computation, name: str) -> Instruction | None:
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    instruction = _through_copies(computation, name)
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.arguments):
        return None
    return int(instruction.arguments)


def _tuple_index(instruction: Instruction) -> int:
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])  # type: ignore[index]


def _step(module: Module, body: Computation, counter: int) -> int:
    """By how much a loop's counter grows."""
    if body.root.opcode != "tuple":
        return 1
    grown = _through_copies(body, body.root.operands[counter])
    if grown is None or grown.opcode != "add":
        return 1
    for operand in grown.operands:
        constant = _constant(body, operand)
        if constant is not None:
            return constant
    return 1


def called_computations(instruction: Instruction) -> list[str]:
    """Names of the computations that a `call` or `conditional` runs."""
    names = re.findall(r"(?:to_apply|true_computation|false_computation)=%?([^\s,}]+)", instruction.attributes)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes):
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return names


def scheduled(module: Module, name: str | None = None, executions: int = 1) -> Iterator[tuple[Instruction, str, int]]:
    """(instruction, its computation, how often it runs) of everything that is scheduled, loops' bodies included.

    A loop whose length depends on data counts once: figures are then per iteration, as for one decode step. Those of
    experts that are used very unevenly (`sharded_experts.FURTHER_ROUNDS`) count as none.
    """
    name = module.entry if name is None else name
    computation = module.computations[name]
    for instruction in computation.values():
        yield instruction, name, executions
        if instruction.opcode == "while":
            trips = trip_count(module, computation, instruction)
            if trips is None:
                trips = 0 if FURTHER_ROUNDS in instruction.op_name else 1
            yield from scheduled(module, instruction.called("body") or "", executions * trips)
        elif instruction.opcode in ("call", "conditional"):
            for called in called_computations(instruction):
                yield from scheduled(module, called, executions)


# --- What it costs ----------------------------------------------------------------------------------------------------


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Floating-point operations of the matrix products in an instruction, those inside a fusion included.

    Pallas kernels count with the estimate that they declare, and our flash attention, which cannot say how much of a
    row of packed texts its queries see, as that of one text.
    """
    if instruction.opcode == "dot":
        lhs = computation[instruction.operands[0]].arrays[0]
        contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = math.prod(lhs.dims[int(d)] for d in contracting[1].split(",") if d) if contracting else 1
        return 2 * math.prod(instruction.arrays[0].dims) * contracted
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        declared = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
        return int(declared[1]) if declared else _attention_flops(instruction)
    if instruction.opcode in ("fusion", "async-start") and (called := instruction.called("calls")):
        inner = module.computations.get(called, Computation())
        return sum(flops(module, inner, i) for i in inner.values())
    return 0


# matrix products per pair of a query and a key that it sees
_ATTENTION_PRODUCTS = {"flash_forward": 2, "flash_backward": 5, "flash_d_query": 3, "flash_d_key": 4}


def _attention_flops(instruction: Instruction) -> int:
    """FLOPs of our flash attention, causal, from the shapes of k [B, K, S, h] and of q, as many times as it has heads.

    q is [N, B, K, G, T and h] in qwen_jax/kernels/flash.py, [N, B, T, H, h] in flash_gpu.py.
    """
    name = next((part for part in instruction.op_name.split("/") if part in _ATTENTION_PRODUCTS), None)
    shapes = [[int(d) for d in dims.split(",") if d] for _, dims, _ in _ARRAY.findall(instruction.attributes)]
    q = next((dims for dims in shapes if len(dims) > 4), None)
    k = next((dims for dims in shapes if len(dims) == 4), None)
    if name is None or q is None or k is None:
        return 0
    batch, _, keys, head_dim = k
    heads = q[2] * q[3] if len(q) == 6 else q[3]
    queries = math.prod(q[1:]) // (batch * heads * head_dim)
    pairs = queries * keys - queries * (queries - 1) // 2 if keys >= queries else keys * (keys + 1) // 2
    return 2 * _ATTENTION_PRODUCTS[name] * batch * heads * head_dim * pairs


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """A TPU's matrix products are convolutions; taps that fall on padding or dilation are not counted."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction.name
    lhs, rhs = (computation[name].arrays[0].dims for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(item.split("=") for item in window[1].split()) if window else {}
    sizes = settings.get("size", "").split("x") if window else []

    def per_dim(name: str, default: str) -> list[str]:
        return settings[name].split("x") if name in settings else [default] * len(sizes)

    taps = 1
    dims = zip(
        sizes,
        per_dim("stride", "1"),
        per_dim("pad", "0_0"),
        per_dim("lhs_dilate", "1"),
        per_dim("rhs_dilate", "1"),
        strict=True,
    )
    for d, (size, stride, pad, lhs_dilate, rhs_dilate) in enumerate(dims):
        taps *= _valid_taps(
            lhs[labels[1].index(str(d))],
            int(size),
            out[labels[3].index(str(d))],
            int(stride),
            int(pad.split("_")[0]),
            int(lhs_dilate),
            int(rhs_dilate),
        )
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    return 2 * batch * features * rhs[labels[2].index("i")] * taps


@functools.lru_cache(maxsize=4096)
def _valid_taps(size: int, window: int, outputs: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Number of (output, tap) pairs of one dimension that read an element of the input."""
    last, count = (size - 1) * lhs_dilate, 0
    for tap in range(window):
        offset = tap * rhs_dilate - pad
        low = max(0, (-offset + stride - 1) // stride)
        high = min(outputs - 1, (last - offset) // stride)
        if lhs_dilate == 1:
            count += max(0, high - low + 1)
        else:
            count += sum((o * stride + offset) % lhs_dilate == 0 for o in range(low, high + 1))
    return count


_NO_TRAFFIC = frozenset(
    """parameter constant tuple get-tuple-element bitcast while call conditional after-all partition-id replica-id
    copy-done async-done async-update all-gather-done all-reduce-done collective-permute-done send-done recv-done
    add-dependency opt-barrier domain""".split()
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
# what writes a part of its first operand in place, and which operand is that part
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def hbm_traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that a scheduled instruction reads from and writes to HBM, a slice of an array counted as the slice.

    A kernel's operands and results count once, though it may read them more often.
    """
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0
    if opcode.endswith("-start"):
        return _start_traffic(module, computation, instruction)
    if opcode == "fusion":
        inner = module.computations[instruction.called("calls") or ""]
        read = sum(
            _read(module, inner, inner.parameters[i])
            for i, operand in enumerate(instruction.operands)
            if operand in computation and computation[operand].hbm_bytes and i in inner.parameters
        )
        return read + _written(module, inner, instruction.arrays)
    if opcode in _SLICES:
        return sum(array.num_bytes for array in instruction.arrays) + instruction.hbm_bytes
    if opcode in _UPDATES:
        update = computation[instruction.operands[_UPDATES[opcode]]]
        return update.hbm_bytes + (update.num_bytes if instruction.hbm_bytes else 0)
    read = sum(computation[name].hbm_bytes for name in dict.fromkeys(instruction.operands) if name in computation)
    return read + instruction.hbm_bytes


def _start_traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "async-start":
        inner = module.computations.get(instruction.called("calls") or "", Computation())
        total = 0
        for wrapped in inner.values():
            if wrapped.opcode not in _NO_TRAFFIC:
                total += hbm_traffic(module, inner, wrapped)
        return total
    # the result of a start holds the operand as well: once each
    arrays = {(str(array), array.space, i % 2): array for i, array in enumerate(instruction.arrays)}
    return sum(array.hbm_bytes for array in arrays.values() if array.dims)


def _read(module: Module, computation: Computation, parameter: Instruction) -> int:
    """Bytes of a fusion's operand that it reads."""
    total = 0
    for user in computation.users.get(parameter.name, ()):
        if user.opcode in _SLICES and user.operands[0] == parameter.name:
            total += user.num_bytes
        elif user.opcode == "tuple" or (user.opcode in _UPDATES and user.operands[0] == parameter.name):
            continue
        elif user.opcode == "bitcast":
            total += _read(module, computation, user)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls") or ""]
            for i, operand in enumerate(user.operands):
                if operand == parameter.name:
                    passed = _through_bitcasts(inner, inner.root) is inner.parameters[i]
                    total += _read(module, computation, user) if passed else _read(module, inner, inner.parameters[i])
        else:
            return parameter.num_bytes
    return min(total, parameter.num_bytes)


def _written(module: Module, computation: Computation, arrays: tuple[Array, ...]) -> int:
    """Bytes that a fusion's results write to HBM; one that updates a slice of an operand writes the slice."""
    roots = [computation.root]
    if computation.root.opcode == "tuple":
        roots = [computation[name] for name in computation.root.operands]
    total = 0
    for root, array in zip(roots, arrays, strict=False):
        if array.space:
            continue
        root = _through_bitcasts(computation, root)
        if root.opcode == "parameter":
            continue
        if root.opcode in _UPDATES:
            total += computation[root.operands[_UPDATES[root.opcode]]].num_bytes
        elif root.opcode == "fusion":
            inner = module.computations[root.called("calls") or ""]
            total += _written(module, inner, (array,))
        else:
            total += array.num_bytes
    return total


def _through_bitcasts(computation: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = computation[instruction.operands[0]]
    return instruction
