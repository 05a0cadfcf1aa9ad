"""Compile targets: devices that are not there, of a TPU slice or of GPUs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import re
from collections.abc import Sequence
from typing import Any

from aot.chips import GPUS, Topology, parse_topology
from qwen_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for, and the compiler that does it."""

    platform: str
    devices: Sequence[Any]
    version: str


def parse_target(text: str) -> Topology:
    """Topology of a TPU slice (`v5p:4x4x8`, `v5e-16`) or of GPUs in one machine (`h200-8`)."""
    match = re.fullmatch(r"(\w+)-(\d+)", text.strip().lower())
    if match and match[1] in GPUS:
        return Topology(GPUS[match[1]], (int(match[2]),))
    return parse_topology(text)


def load_target(text: str) -> Target:
    """The devices of a target. Raises InputError when the compiler for it is not installed."""
    from jax.experimental import topologies

    topology = parse_target(text)
    if topology.chip.is_gpu:
        version = _installed("jax-cuda12-plugin", "pip install jax-cuda12-plugin jax-cuda12-pjrt")
        config = importlib.resources.files("aot").joinpath(f"{topology.chip.name}.txtpb").read_text()
        shape = f"1x1x{topology.num_chips}"
        description = topologies.get_topology_desc("", platform="cuda", target_config=config, topology=shape)
        return Target("gpu", description.devices, version)
    version = _installed("libtpu", "pip install libtpu (x86-64 Linux; no TPU is needed)")
    try:
        several = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology.slice_name, **several)
    except Exception as error:
        raise InputError(f"libtpu {version} knows no slice {topology.name}: {str(error).splitlines()[0]}") from error
    return Target("tpu", description.devices, version)


def _installed(package: str, how: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{package}, the compiler for this target, is not installed; {how}.") from None
