"""Rows of this process onto its devices, as its part of the whole batch's arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.batch import TokenBatch, abstract_batch, batch_shardings, channels


class Feed:
    """Makes batches [rows, length] of the rows that this process has."""

    def __init__(self, kind: type[TokenBatch], mesh: Mesh, rows: int, length: int) -> None:
        self._kind = kind
        self._shapes = abstract_batch(kind, rows, length)
        self._layout = batch_shardings(kind, mesh, rows, length)
        indices = self._layout.tokens.addressable_devices_indices_map((rows, length)).values()
        self.rows = sorted({row for index in indices if index for row in range(*index[0].indices(rows))})
        """Which rows of every batch this process has, in order."""
        self._offsets = {row: offset for offset, row in enumerate(self.rows)}

    def __call__(self, local: Mapping[str, np.ndarray]) -> Any:
        """local: of each channel the rows of this process."""
        return self._kind(**{name: self._array(name, local[name]) for name in channels(self._kind)})

    def empty(self) -> dict[str, np.ndarray]:
        """Rows of padding."""
        shapes = {name: getattr(self._shapes, name) for name in channels(self._kind)}
        return {name: np.zeros((len(self.rows), *shape.shape[1:]), shape.dtype) for name, shape in shapes.items()}

    def _array(self, name: str, local: np.ndarray) -> jax.Array:
        shape = getattr(self._shapes, name).shape

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            offset = self._offsets[start]
            return local[(slice(offset, offset + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, getattr(self._layout, name), shard)
