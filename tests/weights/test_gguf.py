"""GGUF files that the `gguf` package writes, against the Hugging Face folder of the same weights."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qwen_jax.config import LinearScaling, YarnScaling
from qwen_jax.errors import InputError
from qwen_jax.weights.gguf import read_metadata
from qwen_jax.weights.load import flatten, load_params
from qwen_jax.weights.open import open_checkpoint
from tests.weights.tiny import BF16, HF_CONFIGS, QWEN1_CONFIG, hf_state, model_config, qwen1_state, write_folder

gguf = pytest.importorskip("gguf")

ARCHS = {"qwen": "QWEN", "qwen2": "QWEN2", "qwen2_moe": "QWEN2MOE", "qwen3": "QWEN3", "qwen3_moe": "QWEN3MOE"}
CONFIGS = HF_CONFIGS | {"qwen": QWEN1_CONFIG}


def state_of(model_type: str) -> dict[str, np.ndarray]:
    return qwen1_state() if model_type == "qwen" else hf_state(model_type)


def write_gguf(
    path: Path,
    model_type: str,
    state: dict[str, np.ndarray],
    *,
    quantise: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
    split: int = 0,
) -> Path:
    """Names come from the gguf package's own map, so that they check ours."""
    arch = getattr(gguf.MODEL_ARCH, ARCHS[model_type])
    config = CONFIGS[model_type]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads", config["num_attention_heads"]))
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    merged: dict[str, np.ndarray] = {}
    for name, value in state.items():  # as convert_hf_to_gguf.py stacks experts
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            projection = after.split(".", 1)[1]
            count = config["num_experts"]
            merged[f"{before}.experts.{projection}"] = np.stack(
                [state[f"{before}.experts.{e}.{projection}"] for e in range(count)]
            )
        else:
            merged[name] = value.reshape(-1) if "shared_expert_gate" in name else value
    for name, value in merged.items():
        stem, _, kind = name.rpartition(".")
        name = f"{names.get_name(stem)}.{kind}"
        wide = value.astype(np.float32)
        if value.ndim == 1:
            writer.add_tensor(name, wide)
            continue
        tensor_type = gguf.GGMLQuantizationType[(quantise or {}).get(name, "BF16")]
        writer.add_tensor(name, gguf.quants.quantize(wide, tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tree(model: Path, **options) -> dict[str, np.ndarray]:
    params = load_params(open_checkpoint(model), progress=False, **options)
    return {path: np.asarray(leaf) for path, leaf in flatten(params)}


@pytest.mark.parametrize("model_type", ARCHS)
def test_gguf_and_hf_give_the_same_parameters(tmp_path, model_type):
    state = state_of(model_type)
    path = write_gguf(tmp_path / "m.gguf", model_type, state)
    folder = write_folder(tmp_path / "hf", CONFIGS[model_type], state)
    ours, theirs = tree(path), tree(folder)
    assert ours.keys() == theirs.keys()
    for leaf in ours:
        assert ours[leaf].dtype == theirs[leaf].dtype == BF16
        assert ours[leaf].tobytes() == theirs[leaf].tobytes(), leaf


@pytest.mark.parametrize("model_type", ARCHS)
def test_the_configuration_of_a_gguf_is_that_of_config_json(tmp_path, model_type):
    path = write_gguf(tmp_path / "m.gguf", model_type, state_of(model_type))
    config = open_checkpoint(path).config
    expected = model_config(CONFIGS[model_type])
    if model_type == "qwen":  # GGUF cannot say these
        assert config.rope_scaling is None and config.logn_trained_length is None
        config, expected = config.to_hf(), expected.to_hf()
        for mapping in (config, expected):
            del mapping["use_dynamic_ntk"], mapping["use_logn_attn"]
    assert config == expected


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "F16", "F32"])
def test_quantised_tensors_decode_into_the_tree(tmp_path, name):
    state = hf_state("qwen3")
    path = write_gguf(
        tmp_path / "m.gguf", "qwen3", state, quantise={"blk.1.ffn_down.weight": name, "blk.1.attn_q.weight": name}
    )
    ours = tree(path, dtype=np.float32)
    kind = gguf.GGMLQuantizationType[name]
    for key, leaf in (("mlp.down_proj", "layers/mlp/down/kernel"), ("self_attn.q_proj", "layers/attention/q/kernel")):
        wide = state[f"model.layers.1.{key}.weight"].astype(np.float32)
        expected = gguf.quants.dequantize(gguf.quants.quantize(wide, kind), kind)
        np.testing.assert_array_equal(ours[leaf][1].reshape(wide.shape), expected)


def test_the_parts_of_a_split_file_are_joined(tmp_path):
    state = hf_state("qwen2")
    write_gguf(tmp_path / "m.gguf", "qwen2", state, split=20)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 1
    whole = tree(write_gguf(tmp_path / "whole.gguf", "qwen2", state))
    joined = tree(parts[0])
    assert all(whole[leaf].tobytes() == joined[leaf].tobytes() for leaf in whole)
    with pytest.raises(InputError, match="not the first part"):
        open_checkpoint(parts[1]) if "split.count" in read_metadata(parts[1]) else None
    parts[-1].unlink()
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint(parts[0])


def test_rope_scaling_and_unknown_metadata(tmp_path):
    def config(**extra):
        extra = {f"qwen2.{key.replace('__', '.')}": value for key, value in extra.items()}
        return open_checkpoint(write_gguf(tmp_path / "m.gguf", "qwen2", hf_state("qwen2"), extra=extra)).config

    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 128}
    assert config(**yarn).rope_scaling == YarnScaling(factor=4.0, original_length=128)
    assert config(rope__scaling__type="linear", rope__scaling__factor=2.0).rope_scaling == LinearScaling(2.0)
    assert config(rope__scaling__type="none").rope_scaling is None
    for bad, sentence in (
        ({"rope__scaling__type": "longrope"}, "'longrope' is not supported"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "original_context_length"),
        ({"rope__scaling__type": "linear"}, "at least 1"),
        ({"attention__sliding_window": 4096}, "unknown GGUF key 'qwen2.attention.sliding_window'"),
        ({"rope__dimension_count": 8}, "must agree"),
    ):
        with pytest.raises(InputError, match=sentence):
            config(**bad)


def test_an_unknown_architecture_and_type_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="'llama' is not a Qwen text model"):
        open_checkpoint(path)
    write_gguf(path, "qwen2", hf_state("qwen2"))
    data = bytearray(path.read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    data[at : at + 4] = (16).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match="type code 16, which is not read"):
        open_checkpoint(path)


def test_damaged_files_are_one_sentence(tmp_path):
    good = write_gguf(tmp_path / "m.gguf", "qwen2", hf_state("qwen2")).read_bytes()
    path = tmp_path / "bad.gguf"
    for length in (0, 3, 20, 100, 700, len(good) // 2, len(good) - 600):
        path.write_bytes(good[:length])
        with pytest.raises(InputError) as error:
            open_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match="is truncated: tensor .* ends at byte"):
        open_checkpoint(path)
    path.write_bytes(b"GGML" + good[4:])
    with pytest.raises(InputError, match="not a GGUF file"):
        open_checkpoint(path)
    path.write_bytes(good[:4] + (1).to_bytes(4, "little") + good[8:])
    with pytest.raises(InputError, match="GGUF version 1"):
        open_checkpoint(path)


def test_metadata_reads_as_in_the_gguf_package(default_gguf, default_reader):
    ours = read_metadata(default_gguf)
    theirs = {k: f for k, f in default_reader.fields.items() if not k.startswith("GGUF.")}
    assert ours.keys() == theirs.keys()
    for key, field in theirs.items():
        if key.startswith("tokenizer.ggml.") and len(field.data) > 1000:  # slow to decode there: every 997th element
            sample = range(0, len(ours[key]), 997)
            values = [field.parts[field.data[i]] for i in sample]
            text = field.types[-1] == gguf.GGUFValueType.STRING
            values = [bytes(v).decode() if text else v[0] for v in values]
            assert len(ours[key]) == len(field.data) and [ours[key][i] for i in sample] == values
        elif isinstance(ours[key], float):
            assert np.float32(ours[key]) == np.float32(field.contents())
        else:
            assert ours[key] == field.contents()


def test_the_default_model_is_untied_and_loads(default_gguf):
    checkpoint = open_checkpoint(default_gguf)
    assert not checkpoint.config.tie_word_embeddings
    assert (checkpoint.config.rms_norm_eps, checkpoint.config.rope_theta) == (1e-6, 1e6)
    params = load_params(checkpoint, progress=False)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == checkpoint.config.num_params()
    bias = np.asarray(params["layers"]["attention"]["k"]["bias"][0], np.float32)
    assert (bias.min().round(), bias.max().round()) == (-145, 135)  # as the reference measured them


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


LIES = {
    "alignment 0": (_text(b"general.alignment") + struct.pack("<II", 4, 0), 1, b"", 0, "'general.alignment' is 0"),
    "alignment a list": (
        *(_text(b"general.alignment") + struct.pack("<IIQI", 9, 4, 1, 32), 1, b"", 0),
        r"'general.alignment' is \[32\]",
    ),
    "parts as text": (_text(b"split.count") + struct.pack("<I", 8) + _text(b"x"), 1, b"", 0, "'split.count' is 'x'"),
    "a key twice": (2 * (_text(b"a") + struct.pack("<II", 4, 0)), 2, b"", 0, "the key 'a' twice"),
    "arrays of arrays": (_text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, 1, b"", 0, "damaged"),
    "a long array": (_text(b"a") + struct.pack("<IIQ", 9, 4, 2**63), 1, b"", 0, "damaged"),
    "a long text": (struct.pack("<Q", 2**63) + b"x", 1, b"", 0, "damaged"),
    "no axes": (b"", 0, _text(b"x") + struct.pack("<IIQ", 0, 12, 0) + bytes(400), 1, "not whole blocks"),
    "blocks in a vector": (b"", 0, _text(b"x") + struct.pack("<IQIQ", 1, 64, 8, 0) + bytes(400), 1, "not whole blocks"),
    "many axes": (b"", 0, _text(b"x") + struct.pack("<I", 2**31) + bytes(400), 1, "damaged"),
    "huge": (b"", 0, _text(b"x") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0) + bytes(400), 1, "truncated"),
    "one over another": (
        *(b"", 0, b"".join(_text(n) + struct.pack("<IQIQ", 1, 8, 0, 0) for n in (b"x", b"y")) + bytes(400), 2),
        "lies over another",
    ),
}


@pytest.mark.parametrize(("keys", "num_keys", "tensors", "num_tensors", "sentence"), LIES.values(), ids=LIES)
def test_files_that_lie_are_refused(tmp_path, keys, num_keys, tensors, num_tensors, sentence):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + keys + tensors)
    with pytest.raises(InputError, match=sentence) as error:
        read_metadata(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
