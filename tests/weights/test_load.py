"""load_params: the tree of the model, on any sharding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax import model
from qwen_jax.errors import InputError
from qwen_jax.weights.load import ParamsCheckpoint, load_params
from qwen_jax.weights.open import open_checkpoint
from tests.weights.test_hf import make
from tests.weights.tiny import HF_CONFIGS

CASES = ["qwen", *HF_CONFIGS]


@pytest.mark.parametrize("model_type", CASES)
def test_the_tree_is_the_model_s(tmp_path, model_type):
    checkpoint = open_checkpoint(make(tmp_path / "m", model_type))
    float32 = jnp.dtype("float32")
    params = load_params(checkpoint, float32, progress=False)
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert described == model.abstract(checkpoint.config, float32)


@pytest.mark.parametrize("model_type", CASES)
def test_shards_hold_the_same_weights(tmp_path, model_type):
    checkpoint = open_checkpoint(make(tmp_path / "m", model_type))
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    whole = load_params(checkpoint, progress=False)

    def sharding(leaf: jax.Array) -> NamedSharding:
        """The last axes over `a` and `b`; everything is held twice, over `c`."""
        spec: list[str | None] = [None] * leaf.ndim
        for axis, name in zip(reversed(range(leaf.ndim)), ("a", "b"), strict=False):
            spec[axis] = name if leaf.shape[axis] % 2 == 0 else None
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree.map(sharding, whole)
    loaded = load_params(checkpoint, shardings=shardings, progress=False)
    for a, b, s in zip(*map(jax.tree.leaves, (whole, loaded, shardings)), strict=True):
        assert b.sharding == s
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_each_device_s_slice_is_read_once(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(make(tmp_path / "m", "qwen2"))
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    specs = jax.tree.map(lambda _: PartitionSpec(), load_params(checkpoint, progress=False))
    specs["embed"]["embedding"] = PartitionSpec("a")
    read = []
    monkeypatch.setattr(checkpoint, "_read", lambda path, index, out: read.append((path, index[0].start)))
    load_params(checkpoint, shardings=jax.tree.map(lambda s: NamedSharding(mesh, s), specs), progress=False)
    assert sorted(start for path, start in read if path == "embed/embedding") == [0, 24, 48, 72]
    assert len(read) == 4 + len(checkpoint.leaves) - 1


def test_sharded_parameters_are_exported(tmp_path):
    checkpoint = open_checkpoint(make(tmp_path / "m", "qwen2"))
    mesh = jax.make_mesh((8,), ("a",))
    placed = jax.device_put(load_params(checkpoint, progress=False), NamedSharding(mesh, PartitionSpec()))
    placed["embed"]["embedding"] = jax.device_put(placed["embed"]["embedding"], NamedSharding(mesh, PartitionSpec("a")))
    export = ParamsCheckpoint(placed, checkpoint.config)
    rng = np.random.default_rng(0)
    for leaf in export.leaves:
        index = tuple(slice(a := int(rng.integers(0, n)), int(rng.integers(a, n)) + 1) for n in leaf.shape)
        ours, theirs = (np.empty([s.stop - s.start for s in index], np.float32) for _ in range(2))
        export.read(leaf.path, index, ours)
        checkpoint.read(leaf.path, index, theirs)
        np.testing.assert_array_equal(ours, theirs)


def test_parameters_in_memory_have_the_assets_of_their_base(tmp_path):
    folder = make(tmp_path / "m", "qwen2")
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    base = open_checkpoint(folder)
    params = load_params(base, progress=False)
    assert ParamsCheckpoint(params, base.config, base).generation_config() == {"top_k": 7}
    alone = ParamsCheckpoint(params, base.config)
    assert alone.generation_config() == {}
    with pytest.raises(InputError, match="no tokenizer"):
        alone.tokenizer()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        base.generation_config()
