"""`prepare` is a pure function of the parameters: what it makes computes and exports the same, and its input stays."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.prepare import prepare
from infer.qwen import Qwen
from qwen_jax.backend import Backend
from qwen_jax.config import MoeConfig
from qwen_jax.leaves import Int8
from qwen_jax.model import init
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint, flatten, load_params
from qwen_jax.weights.open import open_checkpoint
from tests.infer import tiny

new = jax.jit(init, static_argnums=(0, 2))
MOE = dataclasses.replace(
    tiny.CONFIG,
    model_type="qwen2_moe",
    moe=MoeConfig(num_experts=4, top_k=2, expert_intermediate_size=16, shared_intermediate_size=32),
)


@pytest.mark.parametrize("config", [tiny.CONFIG, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("kernels", ["cpu", "gpu"])
def test_what_is_prepared_is_exported_as_it_was(config: object, kernels: str, tmp_path: Path) -> None:
    params = new(config, jax.random.key(0), jnp.dtype(jnp.bfloat16))  # type: ignore[arg-type]
    prepared = prepare(params, Backend(kernels))  # type: ignore[arg-type]
    assert isinstance(params["layers"], dict)
    save_hf(ParamsCheckpoint(prepared, config), tmp_path / "out", progress=False)  # type: ignore[arg-type]
    read = dict(flatten(load_params(open_checkpoint(tmp_path / "out"), progress=False)))
    assert all(np.array_equal(leaf, read[path]) and leaf.dtype == read[path].dtype for path, leaf in flatten(params))


def test_a_model_keeps_off_the_caller_s_tree() -> None:
    params = new(tiny.CONFIG, jax.random.key(0))
    before = {path: np.array(leaf) for path, leaf in flatten(params)}
    qwen = Qwen(tiny.CONFIG, params, tiny.tokenizer())
    ParamsCheckpoint(qwen.params, tiny.CONFIG)
    assert all(np.array_equal(leaf, before[path]) for path, leaf in flatten(params))
    from_numpy = Qwen(tiny.CONFIG, jax.tree.map(np.asarray, params), tiny.tokenizer())
    for ours, theirs in zip(jax.tree.leaves(from_numpy.params), jax.tree.leaves(qwen.params), strict=True):
        assert isinstance(ours, jax.Array) and np.array_equal(ours, theirs)


def test_cast_traced_twice_and_donated() -> None:
    params = new(tiny.CONFIG, jax.random.key(0))
    cpu = Backend.of(params)
    once = prepare(params, cpu, dtype=jnp.bfloat16)
    traced = jax.jit(lambda params: prepare(params, cpu, dtype=jnp.bfloat16))(params)
    twice = prepare(once, cpu)
    for again in (traced, twice):
        assert jax.tree.structure(again) == jax.tree.structure(once)
        assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(once)))
    assert {leaf.dtype for leaf in jax.tree.leaves(once)} == {jnp.dtype(jnp.bfloat16)}
    leaf = params["layers"]["mlp"]["gate"]["kernel"]
    prepare(params, cpu, donate=True)
    assert leaf.is_deleted()


def test_a_stacked_quantised_weight_is_exported_dequantised() -> None:
    params = new(tiny.CONFIG, jax.random.key(0))
    gate = params["layers"]["mlp"]["gate"]
    gate["kernel"] = weight = Int8.quantise(gate["kernel"])
    out = np.empty((1, 48, 32), np.float32)
    ParamsCheckpoint(params, tiny.CONFIG).read("layers/mlp/gate/kernel", (slice(1, 2), slice(0, 48), slice(0, 32)), out)
    np.testing.assert_array_equal(out[0], weight.dense()[1])
