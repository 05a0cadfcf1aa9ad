"""`qwen-jax convert` as a user runs it: formats, assets, memory, and what is left when it fails."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.weights import _files
from qwen_jax.weights.convert import main
from qwen_jax.weights.names import leaves
from qwen_jax.weights.open import open_checkpoint
from tests.weights.test_hf import make
from tests.weights.tiny import HF_COMMON, assert_bit_equal, model_config, read_state

ASSETS = {
    "tokenizer.json": '{"a": 1}',
    "tokenizer_config.json": "{}",
    "generation_config.json": '{"top_k": 7}',
    "merges.txt": "a b",
    "vocab.json": "{}",
    "chat_template.jinja": "{{ x }}",
}


def run(code: str, *args: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def source(tmp_path) -> Path:
    folder = make(tmp_path / "in", "qwen2")
    for name, text in ASSETS.items():
        (folder / name).write_text(text)
    return folder


def test_both_ways_with_assets(tmp_path, source, capsys):
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    assert main([str(tmp_path / "orbax"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert_bit_equal(read_state(source), read_state(tmp_path / "hf"))
    for folder in ("orbax", "hf"):
        for name, text in ASSETS.items():
            assert (tmp_path / folder / name).read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "in", "orbax"]
    assert "writing" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_dtype_casts_every_tensor(tmp_path, source, to):
    main([str(source), str(tmp_path / "out"), "--to", to, "--dtype", "float32"])
    checkpoint = open_checkpoint(tmp_path / "out")
    assert set(checkpoint.dtypes.values()) == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    out = np.empty((96, 64), np.float32)
    checkpoint.read("embed/embedding", (slice(0, 96), slice(0, 64)), out)
    np.testing.assert_array_equal(out, read_state(source)["model.embed_tokens.weight"].astype(np.float32))


def test_an_existing_destination_is_left_alone(tmp_path, source):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out already exists"):
        main([str(source), str(tmp_path / "out")])
    assert not any((tmp_path / "out").iterdir())


# --- failing while it writes ------------------------------------------------------------------------------------------

# Files may not grow beyond 5000 bytes: a real failure of the operating system, like a full disk's
_LIMITED = """
import resource, sys
from qwen_jax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
main(["convert", *sys.argv[1:]])
"""


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_failing_write_leaves_nothing_and_is_one_sentence(tmp_path, source, to):
    result = run(_LIMITED, source, tmp_path / "out", "--to", to)
    assert result.returncode == 2
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("qwen-jax: ")]
    assert "could not be written (file too large)" in sentence and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(InputError, match=r"out could not be written \(no space left on device\).*; free some space"):
        with _files.new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise OSError(28, "No space left on device")
    assert not any(tmp_path.iterdir())


_SLOW = """
import sys, time
from qwen_jax.weights import checkpoint, convert
read = checkpoint.Checkpoint.read
checkpoint.Checkpoint.read = lambda *args: (time.sleep(0.3), read(*args))
convert.main(sys.argv[1:])
"""


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_killed_conversion_leaves_no_destination_and_the_next_cleans_up(tmp_path, source, to):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", _SLOW, source, out, "--to", to], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.rglob("*") for path in tmp_path.glob(".out.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt), _files.new_folder(out):
        assert len(list(tmp_path.glob(".out.*.partial"))) == 2  # what a living process writes is not removed
        raise KeyboardInterrupt
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and list(tmp_path.glob(".out.*.partial"))
    main([str(source), str(out), "--to", to])
    assert not list(tmp_path.glob(".*.partial"))
    assert open_checkpoint(out).config == open_checkpoint(source).config


# --- memory -----------------------------------------------------------------------------------------------------------

_MEASURED = """
import re, sys
from pathlib import Path
import orbax.checkpoint
from qwen_jax.weights import convert, default_model, export
# not getrusage: its peak begins with that of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
convert.main(sys.argv[1:])
print("grew", peak() - before)
"""


def growth(*args: object) -> int:
    """Bytes by which converting in a process of its own raised that process's peak memory."""
    result = run(_MEASURED, *args, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    assert result.returncode == 0, result.stderr
    return int(re.search(r"grew (\d+)", result.stdout)[1])


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory) -> Path:
    """480 MB in 48 layers; its file is a hole of zeros, so that it costs no disk."""
    raw = HF_COMMON | {"model_type": "qwen2", "hidden_size": 512, "num_hidden_layers": 48, "intermediate_size": 2816}
    folder = tmp_path_factory.mktemp("many_layers")
    (folder / "config.json").write_text(json.dumps(raw))
    header, end = {}, 0
    for leaf in leaves(model_config(raw), "hf"):
        for index in leaf.indices():
            begin, end = end, end + 2 * math.prod(leaf.file_shape)
            entry = {"dtype": "BF16", "shape": leaf.file_shape, "data_offsets": [begin, end]}
            header[leaf.tensor.format(*index)] = entry
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end > 440e6
    return folder


@pytest.mark.slow  # a measurement: allocators hold on to more while other tests run beside it
@pytest.mark.parametrize(("to", "limit"), [("hf", 120e6), ("orbax", 250e6)])
def test_converting_many_layers_holds_a_few_blocks(tmp_path, many_layers, to, limit):
    assert growth(many_layers, tmp_path / "out", "--to", to) < limit
    if to == "orbax":  # and out of Orbax again
        assert growth(tmp_path / "out", tmp_path / "back", "--to", "hf") < limit


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_converting_the_default_model_holds_a_fraction_of_it(tmp_path, default_gguf, to):
    assert growth(default_gguf, tmp_path / "out", "--to", to) < 400e6  # of 1.26 GB; the vocabulary is a good part


# --- the default model ------------------------------------------------------------------------------------------------


def test_a_gguf_s_tokenizer_and_generation_config_are_written(tmp_path, default_gguf):
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(default_gguf)
    checkpoint.write_assets(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("hello world")["input_ids"] == [14990, 1879]
    assert tokenizer.chat_template
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == [151645, 151643] and generation.pad_token_id == 151643
    assert (generation.temperature, generation.top_p, generation.top_k) == (0.7, 0.8, 20)
    assert checkpoint.hf_extra == {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
