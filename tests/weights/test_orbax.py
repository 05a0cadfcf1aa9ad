"""Our Orbax checkpoints: read back by Orbax itself and by us, whole and sharded."""

from __future__ import annotations

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.errors import InputError
from qwen_jax.weights import checkpoint as checkpoint_module
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint, load_params
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.orbax import save_orbax
from tests.weights.test_hf import ALL, DTYPES, make
from tests.weights.tiny import assert_bit_equal, read_state


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ALL)
def test_any_to_orbax_to_any_is_bit_equal(tmp_path, monkeypatch, model_type, dtype):
    monkeypatch.setattr(checkpoint_module, "BLOCK_BYTES", 5000)  # several chunks in most arrays
    source = open_checkpoint(make(tmp_path / "in", model_type, DTYPES[dtype]))
    save_orbax(source, tmp_path / "orbax", progress=False)
    reopened = open_checkpoint(tmp_path / "orbax")
    assert (reopened.config, reopened.dtypes, reopened.hf_extra) == (source.config, source.dtypes, source.hf_extra)
    save_hf(reopened, tmp_path / "out", progress=False)
    assert_bit_equal(read_state(tmp_path / "in"), read_state(tmp_path / "out"))
    # and what Orbax itself restores is our tree
    assert_same(ocp.StandardCheckpointer().restore(tmp_path / "orbax"), load_params(source, progress=False))


def test_orbax_restores_to_shardings(tmp_path):
    source = open_checkpoint(make(tmp_path / "in", "qwen2_moe"))
    save_orbax(source, tmp_path / "orbax", progress=False)
    mesh = jax.make_mesh((8,), ("a",))

    def target(leaf):
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "a" if leaf.shape[-1] % 8 == 0 else None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    targets = jax.tree.map(target, load_params(source, progress=False))
    theirs = ocp.StandardCheckpointer().restore(tmp_path / "orbax", targets)
    shardings = jax.tree.map(lambda t: t.sharding, targets)
    ours = load_params(open_checkpoint(tmp_path / "orbax"), shardings=shardings, progress=False)
    assert_same(ours, theirs)
    assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


def test_a_tree_that_orbax_saved_opens(tmp_path):
    source = open_checkpoint(make(tmp_path / "in", "qwen3"))
    params = load_params(source, progress=False)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", params)
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(source.config.to_hf()))
    assert_same(load_params(open_checkpoint(tmp_path / "orbax"), progress=False), params)


def test_parameters_in_memory_are_saved(tmp_path):
    source = open_checkpoint(make(tmp_path / "in", "qwen"))
    params = load_params(source, progress=False)
    save_orbax(ParamsCheckpoint(params, source.config, source), tmp_path / "orbax", progress=False)
    assert_same(load_params(open_checkpoint(tmp_path / "orbax"), progress=False), params)


def test_the_log_level_is_left_as_it_was_and_nothing_is_logged(tmp_path, caplog, capfd):
    save_orbax(open_checkpoint(make(tmp_path / "in", "qwen3")), tmp_path / "orbax", progress=False)
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_incomplete_checkpoints_are_one_sentence(tmp_path):
    save_orbax(open_checkpoint(make(tmp_path / "in", "qwen3")), tmp_path / "orbax", progress=False)
    config = json.loads((tmp_path / "orbax" / "config.json").read_text())
    for change, sentence in (
        ({"tie_word_embeddings": True}, "holds the parameter lm_head/embedding"),
        ({"model_type": "qwen2"}, "lacks the parameter layers/attention/k/bias"),
        ({"intermediate_size": 32}, "layers/mlp/gate/kernel has shape"),
    ):
        (tmp_path / "orbax" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=sentence):
            open_checkpoint(tmp_path / "orbax")
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(config))
    (tmp_path / "orbax" / "final_norm.scale" / ".zarray").unlink()
    with pytest.raises(InputError, match="files of final_norm/scale are incomplete"):
        open_checkpoint(tmp_path / "orbax")
    (tmp_path / "orbax" / "_METADATA").write_text("{")
    with pytest.raises(InputError, match="_METADATA is not valid JSON"):
        open_checkpoint(tmp_path / "orbax")
    (tmp_path / "orbax" / "_METADATA").write_text('{"tree_metadata": [1]}')
    with pytest.raises(InputError, match="_METADATA is damaged"):
        open_checkpoint(tmp_path / "orbax")


def test_a_lost_or_damaged_chunk_is_an_error(tmp_path, monkeypatch):
    """Of ours, and of what Orbax saves in each of its formats, zeros included."""
    monkeypatch.setattr(checkpoint_module, "BLOCK_BYTES", 5000)
    source = open_checkpoint(make(tmp_path / "in", "qwen3"))
    params = load_params(source, progress=False)
    params["layers"]["mlp"]["up"]["kernel"] *= 0
    save_orbax(ParamsCheckpoint(params, source.config, source), tmp_path / "ours", progress=False)
    for name, ocdbt in (("zarr", False), ("ocdbt", True)):
        with ocp.StandardCheckpointer(use_ocdbt=ocdbt) as checkpointer:
            checkpointer.save(tmp_path / name, params)
        (tmp_path / name / "config.json").write_text(json.dumps(source.config.to_hf()))
        assert_same(load_params(open_checkpoint(tmp_path / name), progress=False), params)
    for name in ("ours", "zarr"):
        assert_same(load_params(open_checkpoint(tmp_path / name), progress=False), params)
        for leaf in ("layers.mlp.gate.kernel", "layers.mlp.up.kernel"):
            chunk = next(f for f in sorted((tmp_path / name / leaf).rglob("*")) if f.is_file() and f.name != ".zarray")
            good = chunk.read_bytes()
            chunk.write_bytes(good[: len(good) // 2])
            with pytest.raises(InputError, match=f"{leaf.replace('.', '/')} are damaged or lost"):
                load_params(open_checkpoint(tmp_path / name), progress=False)
            chunk.unlink()
            with pytest.raises(InputError, match=f"{leaf.replace('.', '/')} are damaged or lost"):
                load_params(open_checkpoint(tmp_path / name), progress=False)
            chunk.write_bytes(good)
