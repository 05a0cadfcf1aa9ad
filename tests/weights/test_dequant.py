"""Our block decoders against the `gguf` package, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_jax.weights.dequant import BLOCK_FORMATS
from qwen_jax.weights.gguf import read_gguf

gguf = pytest.importorskip("gguf")


def reference(blocks: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_random_blocks_decode_as_in_the_gguf_package(name):
    fmt = BLOCK_FORMATS[name]
    blocks = np.random.default_rng(0).integers(0, 256, (3000, fmt.block_bytes), np.uint8)
    out = np.empty((len(blocks), fmt.block_size), np.float32)
    with np.errstate(all="ignore"):
        fmt.decode(blocks, out)
    assert same_bits(out, reference(blocks, name))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_block_sizes_are_the_gguf_package_s(name):
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (BLOCK_FORMATS[name].block_size, BLOCK_FORMATS[name].block_bytes) == sizes


def check_default_model(path, reader, rows_of_each: int | None) -> None:
    _, ours = read_gguf(path)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        stored = theirs[name]
        assert tensor.shape == tuple(reversed(stored.shape.tolist()))
        rows = tensor.shape[0]
        count = min(rows, rows_of_each or rows)
        for start in {0, (rows - count) // 2, rows - count}:
            expected = gguf.quants.dequantize(stored.data[start : start + count], stored.tensor_type)
            chunks = [values.copy() for _, _, values in tensor.rows(start, start + count)]
            assert same_bits(np.concatenate(chunks), expected), (name, start)


def test_rows_of_every_tensor_of_the_default_model(default_gguf, default_reader):
    check_default_model(default_gguf, default_reader, rows_of_each=40)


@pytest.mark.slow
def test_every_value_of_the_default_model(default_gguf, default_reader):
    check_default_model(default_gguf, default_reader, rows_of_each=None)
