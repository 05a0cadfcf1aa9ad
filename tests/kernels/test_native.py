"""The C kernels against float64 on the same rounded activations, weights as the gguf package reads them."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import native
from qwen_jax.kernels.native import FORMATS, GGUF_INPUTS, Library, Strips, builder

gguf = pytest.importorskip("gguf")

ROWS = (1, 2, 3, 7, 8, 11)


@pytest.fixture(scope="module", params=["for this processor", "portable"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    if request.param == "portable":
        portable = builder.build(tmp_path_factory.mktemp("native"), lambda path: None, ["-DPORTABLE"])
        found = Library(portable, "portable_")
        assert found.isa == "portable"
        return found
    if reason := native.why_not():
        pytest.skip(reason)
    return native.library()


def gguf_blocks(format: str, rows: int, inputs: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, blocks, block_bytes] with any codes and with scales of about 0.01."""
    size, count = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]][1], inputs // GGUF_INPUTS[format]
    blocks = rng.integers(0, 256, (rows, count, size), np.uint8)
    places = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q3_K": (108,), "Q6_K": (208,)}
    for at in places.get(format, (0,)):
        scales = rng.standard_normal((rows, count, 1)).astype(np.float16) * np.float16(0.01)
        blocks[..., at : at + 2] = scales.view(np.uint8)
    return blocks


def dequantised(blocks: np.ndarray, format: str) -> np.ndarray:
    decoded = gguf.quants.dequantize(blocks.reshape(-1, blocks.shape[-1]), gguf.GGMLQuantizationType[format])
    return decoded.reshape(len(blocks), -1)


def example(library: Library, format: str, rows: int, inputs: int, group: int = 4) -> tuple[Strips, np.ndarray]:
    """A packed weight and the dense one, float32."""
    rng = np.random.default_rng(rows)
    if format in GGUF_INPUTS:
        blocks = gguf_blocks(format, rows, inputs, rng)
        strips = library.pack_gguf(blocks, format)
        return Strips(jnp.asarray(strips), format, GGUF_INPUTS[format] // 32), dequantised(blocks, format)
    low, high = (0, 16) if format == "INT4" else (-128, 128)
    codes = rng.integers(low, high, (rows, inputs), np.int8)
    scale, offset = rng.standard_normal((2, rows, inputs // 32 // group)).astype(np.float16).astype(np.float32)
    strips = library.pack_groups(codes, scale, offset, format)
    wide = [np.repeat(x, 32 * group, 1) for x in (scale, offset)]
    return Strips(jnp.asarray(strips), format, group), codes * wide[0] - wide[1]


def rounded(x: np.ndarray) -> np.ndarray:
    """x with every 32 of a row rounded to multiples of their largest magnitude / 127, float64."""
    blocks = x.reshape(len(x), -1, 32)
    most = np.abs(blocks).max(-1, keepdims=True)
    codes = np.rint(blocks * (np.float32(127) / most))
    return (codes * (most / np.float32(127)).astype(np.float64)).reshape(x.shape)


@pytest.mark.parametrize("format", FORMATS)
def test_product(library: Library, format: str) -> None:
    for out, inputs in ((48, 256), (336, 1024)):
        weight, dense = example(library, format, out, inputs)
        for rows in ROWS:
            x = np.random.default_rng(rows).standard_normal((rows, inputs)).astype(np.float32)
            exact = rounded(x) @ dense.T.astype(np.float64)
            (y,) = jax.jit(lambda x, strips, w=weight: library.matmul(x, [w._replace(strips=strips)]))(x, weight.strips)
            assert np.abs(y - exact).max() < 1e-6 * np.abs(exact).max()
            plain = x @ dense.T.astype(np.float64)
            assert np.linalg.norm(y - plain) < 1e-2 * np.linalg.norm(plain)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_bit_for_bit_as_gguf_has_them(library: Library, format: str) -> None:
    weight, dense = example(library, format, 48, 512)
    ids = np.array([47, 0, 48, 5, -1, 17], np.int32)
    rows = np.asarray(library.rows(jnp.asarray(ids), weight, 512))
    np.testing.assert_array_equal(rows, np.where((ids >= 0) & (ids < 48), 1, 0)[:, None] * dense[np.clip(ids, 0, 47)])


@pytest.mark.parametrize("special", [0, np.inf, -np.inf, np.nan, 1e-7])
def test_scales_of_any_kind(library: Library, special: float) -> None:
    blocks = gguf_blocks("Q4_0", 16, 64, np.random.default_rng(0))
    blocks[..., :2] = np.full((16, 2, 1), special, np.float16).view(np.uint8)
    weight = Strips(jnp.asarray(library.pack_gguf(blocks, "Q4_0")), "Q4_0", 1)
    with np.errstate(all="ignore"):
        dense = dequantised(blocks, "Q4_0")
    np.testing.assert_array_equal(library.rows(jnp.arange(16, dtype=jnp.int32), weight, 64), dense)


def test_several_weights_at_once(library: Library) -> None:
    pairs = [example(library, format, out, 512) for format, out in (("Q5_0", 48), ("Q6_K", 16), ("INT8", 160))]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 512)), jnp.float32)
    together = library.matmul(x, [weight for weight, _ in pairs])
    for y, (weight, _) in zip(together, pairs, strict=True):
        np.testing.assert_array_equal(y, library.matmul(x, [weight])[0])


@pytest.mark.parametrize("rows", [*ROWS, 130])
def test_mlp(library: Library, rows: int) -> None:
    gate, up = (example(library, format, 320, 256) for format in ("Q5_0", "Q4_K"))
    down = example(library, "Q8_0", 48, 320)
    x = np.random.default_rng(0).standard_normal((rows, 256)).astype(np.float32)
    g, u = (rounded(x) @ dense.T.astype(np.float64) for _, dense in (gate, up))
    hidden = g / (1 + np.exp(-g)) * u
    exact = rounded(hidden.astype(np.float32)) @ down[1].T.astype(np.float64)
    y = library.mlp(jnp.asarray(x), gate[0], up[0], down[0])
    # a feature that lies between two integers may be rounded to either
    assert np.abs(y - exact).max() < 2e-3 * np.abs(exact).max()
    assert np.median(np.abs(y - exact)) < 1e-6 * np.abs(exact).max()


def test_activations_of_any_kind(library: Library) -> None:
    weight, dense = example(library, "Q4_K", 16, 256)
    x = np.zeros((4, 256), np.float32)
    x[1], x[2, 7], x[3, 7] = 1e30, np.nan, np.inf
    (y,) = library.matmul(jnp.asarray(x), [weight])
    assert not np.any(y[0])
    np.testing.assert_allclose(y[1], 1e30 * dense.sum(1, dtype=np.float64), rtol=1e-4, atol=1e25)
    assert not np.isfinite(y[2:]).any()


@pytest.mark.slow
def test_another_processor(tmp_path: Path) -> None:
    """aarch64 with its dot products, emulated."""
    compiler, emulator = (shutil.which(name) for name in ("aarch64-linux-gnu-gcc", "qemu-aarch64"))
    if compiler is None or emulator is None:
        pytest.skip("needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    program, source = tmp_path / "program", Path(__file__).with_name("native_peer.c")
    flags = ["-march=armv8.2-a+dotprod", "-static", "-I", jax.ffi.include_dir()]
    flags += [flag for flag in builder.FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run([compiler, *flags, str(source), "-o", str(program), "-lm"], check=True)
    for format in GGUF_INPUTS:
        rng = np.random.default_rng(0)
        blocks = gguf_blocks(format, 48, 512, rng)
        dense = dequantised(blocks, format)
        for rows in ROWS:
            x = rng.standard_normal((rows, 512)).astype(np.float32)
            command = [emulator, str(program), *map(str, (FORMATS.index(format), 48, 512, rows))]
            done = subprocess.run(command, input=blocks.tobytes() + x.tobytes(), capture_output=True, check=True)
            assert done.stderr == b"neon-dotprod"
            y, weights = np.split(np.frombuffer(done.stdout, np.float32), [rows * 48])
            exact = rounded(x) @ dense.T.astype(np.float64)
            assert np.abs(y.reshape(exact.shape) - exact).max() < 1e-6 * np.abs(exact).max()
            np.testing.assert_array_equal(weights.reshape(dense.shape), dense)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads,kv_heads,width", [(14, 2, 64), (4, 4, 128), (3, 1, 16)])
@pytest.mark.parametrize("capacity", [16, 96, 1024])
def test_attention(library: Library, heads: int, kv_heads: int, width: int, capacity: int) -> None:
    rng, batch = np.random.default_rng(capacity), 3
    q = rng.standard_normal((batch, heads, width)).astype(np.float32) * 3
    k, v = rng.standard_normal((2, batch, kv_heads, capacity, width)).astype(np.float32)
    begins, ends = np.array([0, 3, capacity - 1], np.int32), np.array([1, capacity - 2, capacity + 9], np.int32)
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):  # what is not seen is not read
        k[row, :, :begin], k[row, :, end:], v[row, :, :begin], v[row, :, end:] = [np.nan] * 4
    exact = np.empty(q.shape)
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        keys, values = (np.repeat(x[row, :, begin:end], heads // kv_heads, 0).astype(np.float64) for x in (k, v))
        scores = np.einsum("hd,hsd->hs", q[row], keys) / np.sqrt(width)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        exact[row] = np.einsum("hs,hsd->hd", weights / weights.sum(1, keepdims=True), values)
    identity = np.arange(batch, dtype=np.int32)[:, None]
    y = library.attention(*map(jnp.asarray, (q, k, v, identity, begins, ends)), by_row=True)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=2e-6)

    page = 8  # the same keys, of which each row's lie in pages of a pool, in any order
    order = rng.permutation(batch * capacity // page).astype(np.int32)
    pools = []
    for x in (k, v):
        pool = np.empty((kv_heads, len(order), page, width), np.float32)
        pool[:, order] = np.moveaxis(x, 1, 0).reshape(kv_heads, len(order), page, width)
        pools.append(pool)
    tables = order.reshape(batch, -1)
    y = library.attention(*map(jnp.asarray, (q, *pools, tables, begins, ends)), by_row=False)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=2e-6)


# --- building ---------------------------------------------------------------------------------------------------------


def reason(cache: Path, **environment: str) -> str:
    """What a new process says of its kernels."""
    command = [sys.executable, "-c", "from qwen_jax.kernels import native; print(native.why_not())"]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_built_once_and_again_where_it_is_damaged(tmp_path: Path) -> None:
    if reason_here := native.why_not():
        pytest.skip(reason_here)
    # a compiler that takes no time: it copies what was compiled before
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    built = native.library().functions._name
    script = f'while [ $# -gt 0 ]; do [ "$1" = -o ] && cp {built} "$2" && echo >> {calls}; shift; done; exit 0'
    write_script(compiler, script)
    assert reason(tmp_path, CC=str(compiler)) == "None"
    assert reason(tmp_path, CC=str(compiler)) == "None"
    assert len(calls.read_text()) == 1
    (library,) = (tmp_path / "qwen-jax/native").glob("*.so")
    content = library.read_bytes()
    library.write_bytes(content[: len(content) // 2])
    assert reason(tmp_path, CC=str(compiler)) == "None"
    assert len(calls.read_text()) == 2 and library.read_bytes() == content
    assert sorted(file.suffix for file in library.parent.iterdir()) == ["", ".sha256", ".so"]


def write_script(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("script,said", [("echo 'error: no such thing' >&2; exit 1", "no such thing"), ("exit 3", "3")])
def test_a_broken_compiler(tmp_path: Path, script: str, said: str) -> None:
    compiler = tmp_path / "broken"
    write_script(compiler, script)
    found = reason(tmp_path, CC=str(compiler))
    assert "cannot compile" in found and said in found
    assert [file.name for file in (tmp_path / "qwen-jax/native").iterdir()] == ["lock"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.shutil, "which", lambda name: None)
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(builder.Unavailable, match="no C compiler"):
        builder.compiler()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "qwen-jax").write_text("a file where a folder should be")  # root may write to any folder
    assert "cannot be written" in reason(tmp_path)


def test_a_library_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "kernels.c"
    source = builder.SOURCE.read_text()
    assert "float scale, sum;" in source
    wrong.write_text(source.replace("out->scale = most / 127", "out->scale = most / 128"))
    monkeypatch.setattr(builder, "SOURCE", wrong)
    check: Any = functools.partial(lambda path: Library(path, "wrong_").check())
    with pytest.raises(builder.Unavailable, match="something else"):
        builder.build(tmp_path / "cache", check)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["lock"]
