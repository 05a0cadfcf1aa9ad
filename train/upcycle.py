"""`qwen-jax upcycle`: a dense checkpoint becomes a mixture of experts to train on, as Qwen's own mixtures began.

Qwen2 report (arXiv 2407.10671), section 2.2.2: the dense feed-forward is copied as often as all experts together need,
each copy's intermediate units are shuffled, the result is cut into experts, what is left over is dropped, and half of
each expert's parameters are drawn anew. Attention, norms and embeddings stay; the router is random.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from qwen_jax.config import MoeConfig
from qwen_jax.errors import InputError
from qwen_jax.local_path import LocalPath
from qwen_jax.weights.checkpoint import Checkpoint, Index
from qwen_jax.weights.names import leaves
from qwen_jax.weights.open import open_checkpoint

_MODEL_TYPES = {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
_PERMUTATION, _DRAW, _ROUTER = range(3)  # streams of random numbers


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Make a mixture of experts out of a dense checkpoint, streaming: memory stays at a few layers."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """The dense model: `default`, a folder, a .gguf file, or a Hugging Face id."""
    dst: Annotated[LocalPath, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to write; it must not exist yet."""
    experts: int = 60
    """Routed experts of each layer."""
    top_k: int = 4
    """Of which each token uses so many."""
    expert_size: int = 1408
    """Width of one expert."""
    shared_size: int = 0
    """Width of the shared expert that every token uses; 0 for none. Qwen3's mixtures have none."""
    drawn_anew: float = 0.5
    """Share of each expert's parameters that is random."""
    seed: int = 0
    """Of shuffles and random parameters."""
    to: Literal["orbax", "hf"] = "hf"
    """A Hugging Face folder, or our Orbax checkpoint."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights written."""


def main(argv: Sequence[str]) -> int:
    """Runs `qwen-jax upcycle`. Raises InputError on bad input."""
    options = tyro.cli(Arguments, args=list(argv), prog="qwen-jax upcycle")

    import ml_dtypes

    from qwen_jax.weights.export import save_hf
    from qwen_jax.weights.orbax import save_orbax

    moe = MoeConfig(options.experts, options.top_k, options.expert_size, options.shared_size)
    upcycled = UpcycledCheckpoint(open_checkpoint(options.src), moe, options.drawn_anew, options.seed)
    save = save_orbax if options.to == "orbax" else save_hf
    save(upcycled, options.dst, dtype=np.dtype(ml_dtypes.bfloat16 if options.dtype == "bfloat16" else np.float32))
    total, active = (n / 1e6 for n in (upcycled.config.num_params(), upcycled.config.num_active_params()))
    print(f"{options.src} -> {options.dst}: {total:,.0f}M parameters, {active:,.0f}M of them active")
    return 0


class UpcycledCheckpoint(Checkpoint):
    """A mixture of experts whose weights are made, as they are read, of a dense checkpoint's.

    Raises InputError when the base is not a dense Qwen2 or Qwen3, or the sizes are impossible.
    """

    def __init__(self, base: Checkpoint, moe: MoeConfig, drawn_anew: float = 0.5, seed: int = 0) -> None:
        if base.config.model_type not in _MODEL_TYPES:
            raise InputError(
                f"{base.source} is a {base.config.model_type}; only dense Qwen2 and Qwen3 can be upcycled."
            )
        if moe.expert_intermediate_size < 1 or moe.shared_intermediate_size < 0 or not 0 <= drawn_anew <= 1:
            raise InputError("experts need a width of at least 1, and the share drawn anew lies between 0 and 1.")
        if moe.shared_intermediate_size and base.config.model_type == "qwen3":
            raise InputError("mixtures of Qwen3 have no shared expert; leave --shared-size at 0.")
        if base.config.model_type == "qwen3":
            moe = dataclasses.replace(moe, norm_topk_prob=True)
        model_type = _MODEL_TYPES[base.config.model_type]
        self.config = dataclasses.replace(base.config, model_type=model_type, moe=moe)  # type: ignore[arg-type]
        self.leaves = leaves(self.config, "hf")
        self.hf_extra, self.source = base.hf_extra, base.source
        self._base, self._moe, self._drawn_anew, self._seed = base, moe, drawn_anew, seed
        kept = base.dtypes["layers/mlp/gate/kernel"]
        self.dtypes = {leaf.path: base.dtypes.get(leaf.path, kept) for leaf in self.leaves}
        self._dense = functools.lru_cache(maxsize=4)(self._read_dense)
        self._units = functools.lru_cache(maxsize=4)(self._pool)

    def _read(self, path: str, index: Index, out: np.ndarray) -> None:
        if "/moe/" not in path:
            self._base.read(path, index, out)
            return
        part, name = path.split("/")[2:4]
        layers = range(*index[0].indices(self.config.num_layers))
        for i, layer in enumerate(layers):
            if part == "experts":
                experts = range(*index[1].indices(self._moe.num_experts))
                for j, expert in enumerate(experts):
                    out[i, j] = self._expert(layer, expert, name)[index[2:]]
            elif part == "shared":
                out[i] = self._expert(layer, self._moe.num_experts, name)[index[1:]]
            else:
                shape = (self._moe.num_experts if part == "router" else 1, self.config.hidden_size)
                out[i] = self._random(_ROUTER, layer, len(part)).normal(0, self._std, shape)[index[1:]]

    @property
    def _std(self) -> float:
        return self.config.initializer_range

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *stream])

    def _pool(self, layer: int) -> np.ndarray:
        """Intermediate units of the dense feed-forward, in the order that routed and then shared experts take them."""
        width = self.config.intermediate_size
        needed = self._moe.num_experts * self._moe.expert_intermediate_size + self._moe.shared_intermediate_size
        copies = range(-(-needed // width))
        shuffled = [self._random(_PERMUTATION, layer, copy).permutation(width) for copy in copies]
        return np.concatenate(shuffled)[:needed]

    def _read_dense(self, layer: int, name: str) -> np.ndarray:
        """float32, one row for each intermediate unit."""
        shape = (self.config.intermediate_size, self.config.hidden_size)
        out = np.empty((1, *(shape[::-1] if name == "down" else shape)), np.float32)
        index = (slice(layer, layer + 1), slice(0, out.shape[1]), slice(0, out.shape[2]))
        self._base.read(f"layers/mlp/{name}/kernel", index, out)
        return out[0].T if name == "down" else out[0]

    def _expert(self, layer: int, expert: int, name: str) -> np.ndarray:
        """float32 [width, D], or for `down` [D, width]; expert number E is the shared one."""
        begin = expert * self._moe.expert_intermediate_size
        shared = expert == self._moe.num_experts
        width = self._moe.shared_intermediate_size if shared else self._moe.expert_intermediate_size
        rows = self._dense(layer, name)[self._units(layer)[begin : begin + width]]
        random = self._random(_DRAW, layer, expert, ("gate", "up", "down").index(name))
        anew = random.random(rows.shape) < self._drawn_anew
        rows = np.where(anew, random.normal(0, self._std, rows.shape), rows).astype(np.float32)
        return rows.T if name == "down" else rows

    def write_assets(self, folder: Path) -> None:
        self._base.write_assets(folder)
