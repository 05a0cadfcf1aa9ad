"""Hugging Face folders in and out: every layout that the releases have, and every way in which one can be broken."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.weights import checkpoint as checkpoint_module
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.load import ParamsCheckpoint, flatten, load_params
from qwen_jax.weights.open import open_checkpoint
from qwen_jax.weights.safetensors import read_safetensors
from tests.weights.tiny import (
    BF16,
    HF_CONFIGS,
    QWEN1_CONFIG,
    assert_bit_equal,
    hf_state,
    model_config,
    qwen1_state,
    read_state,
    write_folder,
)

ALL = HF_CONFIGS | {"qwen": QWEN1_CONFIG}
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BF16}


def make(folder: Path, model_type: str, dtype: np.dtype = BF16) -> Path:
    state = qwen1_state(dtype) if model_type == "qwen" else hf_state(model_type, dtype)
    return write_folder(folder, ALL[model_type], state)


def tree(folder: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(load_params(open_checkpoint(folder), progress=False))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ALL)
def test_round_trip_through_our_tree_is_bit_equal(tmp_path, model_type, dtype):
    source = open_checkpoint(make(tmp_path / "in", model_type, DTYPES[dtype]))
    params = load_params(source, progress=False)
    save_hf(ParamsCheckpoint(params, source.config, source), tmp_path / "out", progress=False)
    assert_bit_equal(read_state(tmp_path / "in"), read_state(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == dtype
    assert open_checkpoint(tmp_path / "out").config == source.config == model_config(ALL[model_type])


def test_token_ids_of_the_source_are_kept(tmp_path):
    save_hf(open_checkpoint(make(tmp_path / "in", "qwen3")), tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (3, 5)


def test_the_tree_holds_what_each_name_says(tmp_path):
    state = hf_state("qwen2_moe")
    ours = tree(make(tmp_path / "m", "qwen2_moe"))
    one = {
        "layers/attention/q/kernel": "self_attn.q_proj.weight",
        "layers/attention/v/bias": "self_attn.v_proj.bias",
        "layers/attention/o/kernel": "self_attn.o_proj.weight",
        "layers/attention_norm/scale": "input_layernorm.weight",
        "layers/mlp_norm/scale": "post_attention_layernorm.weight",
        "layers/moe/router/kernel": "mlp.gate.weight",
        "layers/moe/shared/down/kernel": "mlp.shared_expert.down_proj.weight",
        "layers/moe/shared_gate/kernel": "mlp.shared_expert_gate.weight",
    }
    for leaf, name in one.items():
        expected = state[f"model.layers.2.{name}"]
        np.testing.assert_array_equal(ours[leaf][2].reshape(expected.shape), expected)
    np.testing.assert_array_equal(
        ours["layers/moe/experts/up"][1, 4], state["model.layers.1.mlp.experts.4.up_proj.weight"]
    )


def test_qwen1_s_fused_qkv_and_swapped_branches(tmp_path):
    state = qwen1_state()
    ours = tree(make(tmp_path / "m", "qwen"))
    for part, name in enumerate("qkv"):  # c_attn is q, k, v one after another
        rows = slice(64 * part, 64 * (part + 1))
        fused = state["transformer.h.1.attn.c_attn.weight"][rows]
        np.testing.assert_array_equal(ours[f"layers/attention/{name}/kernel"][1].reshape(64, 64), fused)
        bias = state["transformer.h.1.attn.c_attn.bias"][rows]
        np.testing.assert_array_equal(ours[f"layers/attention/{name}/bias"][1].reshape(64), bias)
    np.testing.assert_array_equal(ours["layers/mlp/gate/kernel"][1], state["transformer.h.1.mlp.w2.weight"])
    np.testing.assert_array_equal(ours["layers/mlp/up/kernel"][1], state["transformer.h.1.mlp.w1.weight"])


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ALL)
def test_shards_are_written_and_read(tmp_path, model_type):
    source = open_checkpoint(make(tmp_path / "in", model_type))
    save_hf(source, tmp_path / "out", max_shard_bytes=60_000, progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in read_state(tmp_path / "in").values())
    assert_bit_equal(read_state(tmp_path / "in"), read_state(tmp_path / "out"))
    save_hf(open_checkpoint(tmp_path / "out"), tmp_path / "again", progress=False)
    assert_bit_equal(read_state(tmp_path / "in"), read_state(tmp_path / "again"))


def write_bin(folder: Path, model_type: str, shards: int) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    state = qwen1_state() if model_type == "qwen" else hf_state(model_type)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ALL[model_type]))
    tensors = {name: torch.from_numpy(value.view(np.int16)).view(torch.bfloat16) for name, value in state.items()}
    name = next(name for name, value in tensors.items() if value.ndim == 2)
    tensors[name] = tensors[name].T.contiguous().T  # a file may hold tensors that are not contiguous
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return state
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = dict(list(tensors.items())[i::shards])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("model_type", ["qwen", "qwen2", "qwen3_moe"])
def test_torch_bin_files(tmp_path, model_type, shards):
    state = write_bin(tmp_path / "in", model_type, shards)
    save_hf(open_checkpoint(tmp_path / "in"), tmp_path / "out", progress=False)
    assert_bit_equal(state, read_state(tmp_path / "out"))


def test_tied_head_stored_beside_the_embedding(tmp_path):
    state = hf_state("qwen2")
    write_folder(
        tmp_path / "same", HF_CONFIGS["qwen2"], state | {"lm_head.weight": state["model.embed_tokens.weight"].copy()}
    )
    assert open_checkpoint(tmp_path / "same").config.tie_word_embeddings
    assert "lm_head/embedding" not in tree(tmp_path / "same")
    other = state["model.embed_tokens.weight"][::-1].copy()
    write_folder(tmp_path / "other", HF_CONFIGS["qwen2"], state | {"lm_head.weight": other})
    assert not open_checkpoint(tmp_path / "other").config.tie_word_embeddings
    np.testing.assert_array_equal(tree(tmp_path / "other")["lm_head/embedding"], other)


def test_rotary_buffers_are_ignored(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    write_folder(tmp_path / "m", HF_CONFIGS["qwen2"], hf_state("qwen2") | extra)
    assert "embed/embedding" in tree(tmp_path / "m")


@pytest.mark.parametrize("model_type", ALL)
def test_any_slice_can_be_read(tmp_path, model_type):
    source = open_checkpoint(make(tmp_path / "m", model_type))
    rng = np.random.default_rng(3)
    whole = tree(tmp_path / "m")
    for leaf in source.leaves:
        for _ in range(4):
            starts = [int(rng.integers(0, n)) for n in leaf.shape]
            index = tuple(slice(a, int(rng.integers(a, n)) + 1) for a, n in zip(starts, leaf.shape, strict=True))
            out = np.empty(whole[leaf.path][index].shape, np.float32)
            source.read(leaf.path, index, out)
            np.testing.assert_array_equal(out, whole[leaf.path][index].astype(np.float32))


def test_small_blocks_cover_every_leaf(tmp_path, monkeypatch):
    folder = make(tmp_path / "m", "qwen3_moe")
    whole = tree(folder)
    monkeypatch.setattr(checkpoint_module, "BLOCK_BYTES", 300)  # less than a row of most leaves
    pieces = tree(folder)
    assert all(whole[path].tobytes() == pieces[path].tobytes() for path in whole)
    save_hf(open_checkpoint(folder), tmp_path / "out", progress=False)
    assert_bit_equal(read_state(folder), read_state(tmp_path / "out"))


# --- bad input --------------------------------------------------------------------------------------------------------


def refuse(model: Path | str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        open_checkpoint(model)
    assert "\n" not in str(error.value)


def test_missing_extra_and_misshapen_tensors(tmp_path):
    state, config = hf_state("qwen2"), HF_CONFIGS["qwen2"]
    name = "model.layers.1.mlp.up_proj.weight"
    write_folder(tmp_path / "a", config, {k: v for k, v in state.items() if k != name})
    refuse(tmp_path / "a", f"lacks the tensor {name}")
    write_folder(tmp_path / "b", config, state | {"model.layers.3.mlp.up_proj.weight": state[name]})
    refuse(tmp_path / "b", "holds the tensor model.layers.3.mlp.up_proj.weight")
    write_folder(tmp_path / "c", config, state | {name: state[name].T.copy()})
    refuse(tmp_path / "c", rf"{name} has shape \(64, 96\), but the configuration says \(96, 64\)")
    write_folder(tmp_path / "d", config | {"tie_word_embeddings": False}, state)
    refuse(tmp_path / "d", "lacks the tensor lm_head.weight")
    write_folder(tmp_path / "e", config, state | {name: state[name].astype(np.int8)})
    refuse(tmp_path / "e", "type I8, which is not read")


def test_missing_shard_and_broken_index(tmp_path):
    save_hf(open_checkpoint(make(tmp_path / "in", "qwen2")), tmp_path / "m", max_shard_bytes=60_000, progress=False)
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.unlink()
    refuse(tmp_path / "m", f"lacks the shard {shard.name}")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text("{")
    refuse(tmp_path / "m", "is not valid JSON")
    for content in ([], {}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {}}):
        index.write_text(json.dumps(content))
        refuse(tmp_path / "m", "not a valid index")


def test_an_index_names_files_of_its_folder(tmp_path):
    save_hf(open_checkpoint(make(tmp_path / "in", "qwen2")), tmp_path / "m", max_shard_bytes=60_000, progress=False)
    good = open_checkpoint(tmp_path / "m").config
    for shard in (tmp_path / "m").glob("*.safetensors"):  # links to other places are how a cache of downloads is made
        (tmp_path / "blobs").mkdir(exist_ok=True)
        shard.rename(tmp_path / "blobs" / shard.name)
        shard.symlink_to(f"../blobs/{shard.name}")
    assert open_checkpoint(tmp_path / "m").config == good
    index = tmp_path / "m" / "model.safetensors.index.json"
    outside = tmp_path / "blobs" / shard.name
    for name in (f"../blobs/{shard.name}", str(outside), f"/{outside}", f"a/../../blobs/{shard.name}", 5, None, ["a"]):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        refuse(tmp_path / "m", "which is not a file in")
        (tmp_path / "n").mkdir(exist_ok=True)
        config = json.loads((tmp_path / "in" / "config.json").read_text()) | {"transformers_weights": name}
        (tmp_path / "n" / "config.json").write_text(json.dumps(config))
        if name is not None:
            refuse(tmp_path / "n", "which is not a file in")
    for name in ("", ".", "nul\0", "line\nbreak", "x" * 5000):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        refuse(tmp_path / "m", "lacks the shard|which is not a file in")


def test_truncated_and_damaged_safetensors(tmp_path):
    folder = make(tmp_path / "m", "qwen2")
    file = folder / "model.safetensors"
    good = file.read_bytes()
    for length in (0, 4, 100, len(good) - 10):
        file.write_bytes(good[:length])
        refuse(folder, "is damaged or truncated")
    file.write_bytes(good[:8] + b"x" * (len(good) - 8))
    refuse(folder, "is damaged or truncated")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        {"x": F32 | {"shape": [1], "data_offsets": [-4, 0]}},
        {"x": F32 | {"shape": [-1, -2]}},
        {"x": F32 | {"shape": [2.0]}},
        {"x": F32 | {"data_offsets": [0, 8.0]}},
        {"x": F32 | {"shape": "ab"}},
        {"x": F32 | {"shape": [2**62, 2**62]}},
        {"x": F32 | {"dtype": "F3"}},
        {"x": F32, "y": F32},
        {"x": F32 | {"data_offsets": [4, 8], "shape": [1]}},
        {"x": {}},
        {"x": 5},
        [F32],
    ],
)
def test_safetensors_whose_header_lies(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"12345678")
    with pytest.raises(InputError, match="x.safetensors is damaged or truncated") as error:
        read_safetensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_safetensors_with_a_nested_header(tmp_path):
    text = b'{"x":' * 100_000
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="x.safetensors is damaged or truncated"):
        read_safetensors(tmp_path / "x.safetensors")


def test_bad_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    write_bin(tmp_path / "m", "qwen2", 1)
    file = tmp_path / "m" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    refuse(tmp_path / "m", "damaged or truncated")

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"a": Evil()}, file)
    refuse(tmp_path / "m", "code is never run")
    assert not (tmp_path / "ran").exists()

    def saved(state: object) -> bytes:
        torch.save(state, file)
        return file.read_bytes()

    good = saved({"a": torch.zeros(1000)})
    with zipfile.ZipFile(io.BytesIO(good)) as archive, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as small:
        for record in archive.infolist():
            small.writestr(record.filename, archive.read(record))
    refuse(tmp_path / "m", "compressed or overlapping records")
    saved({"a": bytearray(5)})  # how a small pickle could ask for any memory
    refuse(tmp_path / "m", "code is never run")
    saved({"a": torch.zeros(2, 2).to_sparse()})
    refuse(tmp_path / "m", "code is never run")
    saved({5: torch.zeros(2)})
    refuse(tmp_path / "m", "plain tensors by name")
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    refuse(tmp_path / "m", "before 1.6")
    torch.save({"a": 1}, file)
    refuse(tmp_path / "m", "not a plain mapping")


def test_models_that_do_not_exist(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse(tmp_path / "nope", "does not exist")
    refuse("nope.gguf", "does not exist")
    refuse("someone/nope", "someone/nope is not a local path, and cannot be downloaded")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "needs a config.json")
    shutil.copy(make(tmp_path / "in", "qwen2") / "config.json", tmp_path / "empty")
    refuse(tmp_path / "empty", "holds no weights")
    (tmp_path / "file.txt").write_text("")
    refuse(tmp_path / "file.txt", "not a .gguf")


def test_a_hub_model_is_fetched_without_bin_when_it_has_safetensors(tmp_path, monkeypatch):
    make(tmp_path / "snapshot", "qwen2")
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_checkpoint("Qwen/Tiny").config == model_config(HF_CONFIGS["qwen2"])
    assert [repo for repo, _ in asked] == ["Qwen/Tiny"] and "*.bin" not in asked[0][1]


def test_weights_too_large_for_float16_are_refused(tmp_path):
    state = hf_state("qwen2", np.dtype(np.float32))
    state["model.norm.weight"][3] = 1e5
    source = open_checkpoint(write_folder(tmp_path / "m", HF_CONFIGS["qwen2"], state))
    with pytest.raises(InputError, match="final_norm/scale has weights beyond float16"):
        save_hf(source, tmp_path / "out", dtype=np.float16, progress=False)
    assert not (tmp_path / "out").exists()


def test_parameters_of_another_configuration_are_refused(tmp_path):
    source = open_checkpoint(make(tmp_path / "m", "qwen2"))
    params = load_params(source, progress=False)
    with pytest.raises(InputError, match="lm_head/embedding should be"):
        ParamsCheckpoint(params, model_config(HF_CONFIGS["qwen2"] | {"tie_word_embeddings": False}))
