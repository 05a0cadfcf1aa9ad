"""What XLA:TPU is told besides the program, by chip generation; `train` and `compile` pass the same.

docs/tpu.md has the figures for which each option is here.
"""

from __future__ import annotations

from collections.abc import Mapping

# sums that are split afterwards become reduce-scatters, which send half of an all-reduce
_REDUCE_SCATTER = {
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
}

# By the beginning of a device's kind, as in `flops.PEAK_FLOPS`.
TRAINING: Mapping[str, Mapping[str, str]] = {
    "TPU v5 lite": _REDUCE_SCATTER,
    "TPU v5": _REDUCE_SCATTER,
    "TPU v6 lite": _REDUCE_SCATTER,
}


def training_options(device_kind: str) -> dict[str, str]:
    """Options of a training step for a kind of device; none where there are none."""
    return dict(next((options for kind, options in TRAINING.items() if device_kind.startswith(kind)), {}))
