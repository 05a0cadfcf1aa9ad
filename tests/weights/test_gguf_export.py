"""GGUF out: blocks as llama.cpp makes them, files that say what the model is, and nothing half-written."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax.config import DualChunk, LinearScaling, MoeConfig, YarnScaling
from qwen_jax.errors import InputError
from qwen_jax.leaves.encode import ENCODERS, encode
from qwen_jax.model import init
from qwen_jax.weights.dequant import BLOCK_FORMATS
from qwen_jax.weights.gguf import read_gguf
from qwen_jax.weights.gguf_export import more_bits, save_gguf, unsaid
from qwen_jax.weights.load import load_params
from qwen_jax.weights.open import open_checkpoint
from tests.infer import tiny
from train.quantise.command import main as quantize

MOE = MoeConfig(4, 2, 16, 24)
CONFIGS = {
    "qwen": dataclasses.replace(tiny.QWEN1_CONFIG, rope_scaling=None, logn_trained_length=None),
    "qwen2, tied": dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True),
    "qwen2, untied": dataclasses.replace(tiny.CONFIG, tie_word_embeddings=False),
    "qwen2, YaRN": dataclasses.replace(tiny.CONFIG, rope_scaling=YarnScaling(4.0, 128)),
    "qwen2, linear": dataclasses.replace(tiny.CONFIG, rope_scaling=LinearScaling(2.0)),
    "qwen2_moe": dataclasses.replace(tiny.CONFIG, model_type="qwen2_moe", moe=MOE),
    "qwen3": dataclasses.replace(tiny.CONFIG, model_type="qwen3", head_dim=16),
    "qwen3_moe": dataclasses.replace(
        tiny.CONFIG, model_type="qwen3_moe", moe=MoeConfig(4, 2, 16, 0, norm_topk_prob=True)
    ),
}


def decoded(blocks: np.ndarray, format: str) -> np.ndarray:
    fmt = BLOCK_FORMATS[format]
    out = np.empty((blocks.size // fmt.block_bytes, fmt.block_size), np.float32)
    fmt.decode(blocks.reshape(-1, fmt.block_bytes), out)
    return out.reshape(len(blocks), -1)


@pytest.mark.parametrize("format", ENCODERS)
def test_blocks_are_those_of_llama_cpp(format):
    """Against `ggml_quantize_chunk` (llama.cpp b11549, x86-64) on normal, positive, negative, zero and wild rows."""
    with np.load(Path(__file__).parent / "data" / "llama_cpp_blocks.npz") as file:
        values, theirs = file["values"], file[format]
    ours = encode(values, format)
    if not format.endswith("_K"):
        assert (ours == theirs).all()
        return
    # its compiler and ours fuse other operations, so that a search may end one step beside
    assert (ours == theirs).mean() > 0.95
    error, limit = (np.linalg.norm(decoded(blocks, format) - values, axis=1) for blocks in (ours, theirs))
    assert (error <= limit * 1.005 + 1e-9).all()


def test_values_without_a_scale():
    for format in ENCODERS:
        for value in (0.0, 1e-30, 0.25, -0.25):
            rows = np.full((2, 256), value, np.float32)
            limit = 1e-5 if abs(value) < 1e-5 else 0.01 * abs(value)
            assert np.abs(decoded(encode(rows, format), format) - rows).max() <= limit, (format, value)


def test_the_layers_that_get_more_bits():
    """Those whose values the released 0.5B has in Q8_0; it was made when layers were counted in the order of names."""
    by_name = sorted(range(24), key=str)
    assert {by_name[i] for i in range(24) if more_bits(i, 24)} == {0, 1, 3, 6, 7, 8, 9, 10, 13, 16, 19, 21}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_says_what_the_model_is(name, tmp_path):
    config = CONFIGS[name]
    params = init(config, jax.random.key(3))
    source = open_checkpoint(tiny.save_folder(tmp_path / "hf", config, params))
    save_gguf(source, tmp_path / "m.gguf", "f32", progress=False)
    found = open_checkpoint(tmp_path / "m.gguf")
    assert found.config == dataclasses.replace(config, initializer_range=0.02)  # of which GGUF says nothing
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), load_params(found, np.float32, progress=False, dequantise=True), params
    )
    assert all(jax.tree.leaves(same))
    ours, theirs = found.tokenizer(), source.tokenizer()
    text = "the théin <|im_start|>\n<|im_end|>"
    assert ours.encode(text) == theirs.encode(text) and ours.eos_ids == theirs.eos_ids
    assert ours.special_ids == theirs.special_ids and ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m", "q6_k"])
def test_quantised_files_open(kind, tmp_path, capsys):
    config = dataclasses.replace(tiny.CONFIG, hidden_size=256, num_heads=4, head_dim=64, intermediate_size=320)
    folder = tiny.save_folder(tmp_path / "hf", config, init(config, jax.random.key(3)))
    assert quantize([str(folder), str(tmp_path / "m.gguf"), "--to", f"gguf-{kind}"]) == 0
    said = capsys.readouterr().out
    assert "ffn_down" in said and "bits for each parameter" in said
    _, tensors = read_gguf(tmp_path / "m.gguf")
    gguf = pytest.importorskip("gguf")
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name: t.encoding for name, t in tensors.items()} == {n: t.tensor_type.name for n, t in theirs.items()}
    expected = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k_m": "Q4_K", "q6_k": "Q6_K"}[kind]
    assert tensors["blk.0.attn_q.weight"].encoding == expected
    # rows of 320 are no multiple of 256
    fallback = {"q4_k_m": ("Q5_0", "Q8_0"), "q6_k": ("Q8_0",)}.get(kind, (expected,))
    assert tensors["blk.0.ffn_down.weight"].encoding in fallback
    assert tensors["blk.0.attn_norm.weight"].encoding == "F32"


def test_what_gguf_cannot_say(capsys, tmp_path):
    assert unsaid(tiny.QWEN1_CONFIG) == ["dynamic NTK", "LogN attention"]
    config = dataclasses.replace(tiny.CONFIG, dual_chunk=DualChunk(64, 8, 128))
    assert unsaid(config) == ["Dual Chunk Attention"] and not unsaid(tiny.CONFIG)


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    source = open_checkpoint(tiny.save_folder(tmp_path / "hf", tiny.CONFIG, init(tiny.CONFIG, jax.random.key(3))))
    with pytest.raises(InputError, match=r"must end in \.gguf"):
        save_gguf(source, tmp_path / "m.bin", "f16", progress=False)
    (tmp_path / "there.gguf").touch()
    with pytest.raises(InputError, match="already exists"):
        save_gguf(source, tmp_path / "there.gguf", "f16", progress=False)
    left = tmp_path / ".m.gguf.1234.partial"
    left.touch()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError):
        save_gguf(source, tmp_path / "m.gguf", "f16", progress=False)
    assert not list(tmp_path.glob("*m.gguf*")) and not left.exists()
