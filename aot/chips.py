"""TPU generations and slices: what a chip can do, and how its chips are wired."""

from __future__ import annotations

import dataclasses
import math
import re

from qwen_jax.errors import InputError
from qwen_jax.flops import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation. Rates are per JAX device, which is a chip except for tpu7x, where it is half of one.

    peak_flops, hbm_bandwidth and link_bandwidth (one link, one direction) in units per second are Google's published
    ones (docs.cloud.google.com/tpu/docs, the page of each generation); the ICI figure there is of all links and both
    directions. dcn_bandwidth, between slices, is that page's too, that of a pod divided by its chips. hbm_bytes is what
    libtpu 0.0.51 leaves to a program, less than the chip's nominal memory. clock (Hz) follows from the peak and the
    size and number of the matrix units.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    clock: float
    dimensions: int
    dcn_bandwidth: float = 0.0
    devices_per_chip: int = 1
    cores_per_chip: int = 1  # Cloud counts these, not chips, in the accelerator types of v5p
    is_gpu: bool = False  # GPUs of one machine: dimensions is 1, and every pair has the same bandwidth

    @property
    def ring_length(self) -> int:
        """A side of this length closes to a ring; in three dimensions when all sides are multiples of it."""
        return 16 if self.dimensions == 2 else 4


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", PEAK_FLOPS["TPU v5 lite"], int(15.75 * GIB), 819e9, 50e9, 1.5e9, 2, 3.125e9),
        Chip("v5p", PEAK_FLOPS["TPU v5"], int(95.73 * GIB), 2765e9, 100e9, 1.75e9, 3, 6.25e9, cores_per_chip=2),
        Chip("v6e", PEAK_FLOPS["TPU v6 lite"], int(31.24 * GIB), 1640e9, 100e9, 1.75e9, 2, 12.5e9),
        Chip("tpu7x", PEAK_FLOPS["TPU7x"], int(94.74 * GIB), 7380e9 / 2, 100e9, 1.9e9, 3, devices_per_chip=2),
    )
}

# NVIDIA's data sheet: dense bfloat16 peak, memory, and NVLink in one direction
GPUS = {"h200": Chip("h200", PEAK_FLOPS["NVIDIA H200"], 151397597184, 4800e9, 450e9, 1.98e9, 1, is_gpu=True)}

# the shapes that Cloud offers, by number of chips
_SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SHAPES_3D = (
    *((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    *((8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24)),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several alike: each a box of chips of one generation."""

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return self.num_slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """JAX devices."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def name(self) -> str:
        """Such as `v5p:4x4x8` or `2 x v5e:16x16`; of GPUs, such as `h200-8`."""
        return f"{self.num_slices} x {self.slice_name}" if self.num_slices > 1 else self.slice_name

    @property
    def slice_name(self) -> str:
        """One slice's, as libtpu wants it."""
        return f"{self.chip.name}{'-' if self.chip.is_gpu else ':'}{'x'.join(map(str, self.shape))}"

    @property
    def accelerator_type(self) -> str:
        """Cloud's name for a slice, which counts TensorCores on v5p: 128 chips are a v5p-256."""
        return f"{self.chip.name}-{math.prod(self.shape) * self.chip.cores_per_chip}"

    @property
    def rings(self) -> tuple[bool, ...]:
        """For each side, whether its ends are linked."""
        length = self.chip.ring_length
        if self.chip.dimensions == 2:
            return tuple(side == length for side in self.shape)
        return (all(side % length == 0 for side in self.shape),) * len(self.shape)


def parse_topology(text: str) -> Topology:
    """Topology of `v5p:4x4x8` or, by number of chips, `v5e-16`, or several such slices, `2 x v5e-256`.

    Raises InputError for what does not exist.
    """
    slices = re.fullmatch(r"(?:(\d+) ?x ?)?([a-z].*)", text.strip().lower())
    match = slices and re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)+)|-(\d+))", slices[2])
    if not slices or not match or match[1] not in CHIPS or slices[1] == "0":
        raise InputError(
            f"{text!r} is not a TPU slice; write a generation ({', '.join(CHIPS)}) and its shape or its number of "
            "chips, such as v5p:4x4x8 or v5e-16, or several slices as 2xv5e-256."
        )
    chip, num_slices = CHIPS[match[1]], int(slices[1] or 1)
    if num_slices > 1 and not chip.dcn_bandwidth:
        raise InputError(f"no rate is known at which slices of {chip.name} send to each other; name a single one.")
    shapes = _SHAPES_2D if chip.dimensions == 2 else _SHAPES_3D
    if match[3]:
        by_chips = {math.prod(shape): shape for shape in shapes}
        if int(match[3]) not in by_chips:
            known = ", ".join(map(str, by_chips))
            raise InputError(f"there is no {chip.name} slice of {match[3]} chips; there are ones of {known}.")
        return Topology(chip, by_chips[int(match[3])], num_slices)
    shape = tuple(map(int, match[2].split("x")))
    if len(shape) != chip.dimensions or not all(shape):
        raise InputError(
            f"{text!r} has {len(shape)} sides, but a {chip.name} slice has {chip.dimensions}, "
            f"as {chip.name}:{'x'.join('4' * chip.dimensions)}."
        )
    return Topology(chip, shape, num_slices)
