"""Bad input through the console command: one sentence on stderr, no traceback, status 2."""

import dataclasses
import io
import json
import shutil
import socket

import jax
import pytest

from qwen_jax import cli
from qwen_jax.model import init
from tests.infer import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A complete small model, in a folder."""
    return tiny.save_folder(
        tmp_path_factory.mktemp("models") / "good", tiny.CONFIG, init(tiny.CONFIG, jax.random.key(0))
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compiled programs go nowhere that outlives the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of the folder with other entries in config.json."""

    def make(**entries):
        copy = tmp_path / "changed"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text()) | entries
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return make


@pytest.fixture
def sentence(capsys):
    """Runs the command, checks how it ends, and returns what it said."""

    def run(*argv):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert stopped.value.code == 2
        assert out == ""
        assert err.startswith("qwen-jax: ") and err.endswith(".\n") and err.count("\n") == 1, err
        assert "Traceback" not in err
        return err

    return run


def test_the_same_folder_is_good(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--model", str(folder), "--max-tokens", "2", "hello"])
    assert not stopped.value.code
    assert capsys.readouterr().err == ""


def test_truncated_gguf(default_gguf, tmp_path, sentence):
    whole = default_gguf.stat().st_size
    for size in (0, 10, 100_000, 7_000_000):  # before, in and after the metadata
        with default_gguf.open("rb") as file:
            (tmp_path / "short.gguf").write_bytes(file.read(size))
        assert size < whole and "short.gguf" in sentence("generate", "--model", tmp_path / "short.gguf", "hi")


def test_missing_shard(changed, sentence):
    copy = changed()
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "lacks the shard model-00002-of-00002.safetensors" in sentence("generate", "--model", copy, "hi")


def test_truncated_safetensors(changed, sentence):
    weights = changed() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is damaged or truncated" in sentence("chat", "--model", weights.parent)


def test_no_weights(changed, sentence):
    (copy := changed()).joinpath("model.safetensors").unlink()
    assert "holds no weights" in sentence("generate", "--model", copy, "hi")


def test_unknown_rope_scaling(changed, sentence):
    copy = changed(rope_scaling={"rope_type": "longrope", "factor": 4.0})
    assert "longrope" in sentence("generate", "--model", copy, "hi")


def test_unknown_config_key(changed, sentence):
    assert "'attention_sink'" in sentence("generate", "--model", changed(attention_sink=4), "hi")


def test_not_a_qwen(changed, sentence):
    assert "'llama'" in sentence("generate", "--model", changed(model_type="llama"), "hi")


def test_weights_of_another_size(changed, sentence):
    said = sentence("generate", "--model", changed(intermediate_size=64), "hi")
    assert "weights and configuration do not belong together" in said


def test_tokenizer_with_more_tokens_than_rows(tmp_path, sentence):
    config = dataclasses.replace(tiny.CONFIG, vocab_size=200)
    small = tiny.save_folder(tmp_path / "small", config, init(config, jax.random.key(0)))
    assert "the tokenizer has 263 tokens but the model only 200 rows" in sentence("generate", "--model", small, "hi")


def test_no_tokenizer(changed, sentence):
    copy = changed()
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (copy / name).unlink()
    assert "has no tokenizer" in sentence("generate", "--model", copy, "hi")


def test_damaged_tokenizer(changed, sentence):
    (copy := changed()).joinpath("tokenizer.json").write_text("{")
    assert "is not a tokenizer.json" in sentence("generate", "--model", copy, "hi")


def test_prompt_longer_than_the_context(folder, sentence):
    said = sentence("generate", "--model", folder, "--raw", "x" * 512)
    assert "a prompt of 512 tokens does not fit the context of 512" in said


def test_paths_that_do_not_exist(tmp_path, sentence):
    assert "does not exist" in sentence("generate", "--model", tmp_path / "nothing", "hi")
    assert "does not exist" in sentence("generate", "--model", "nothing.gguf", "hi")
    (tmp_path / "empty").mkdir()
    assert "needs a config.json" in sentence("generate", "--model", tmp_path / "empty", "hi")
    (tmp_path / "text.txt").write_text("hello")
    assert "not a .gguf" in sentence("generate", "--model", tmp_path / "text.txt", "hi")


def test_hub_id_without_a_network(monkeypatch, sentence):
    import huggingface_hub.constants

    def unreachable(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    said = sentence("generate", "--model", "Qwen/No-Such-Model", "hi")
    assert "Qwen/No-Such-Model is not a local path, and cannot be downloaded" in said


@pytest.mark.parametrize("prompts", [[""], ["good", "  \n"], []])
def test_empty_prompt(folder, sentence, monkeypatch, prompts):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "the prompt is empty" in sentence("generate", "--model", folder, *prompts)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("top-p", "2"), ("top-p", "0"), ("top-p", "nan"), ("temperature", "-1"), ("temperature", "inf")],
        *[("top-k", "-3"), ("min-p", "1.5"), ("repetition-penalty", "0"), ("presence-penalty", "9"), ("seed", "-1")],
        *[("max-tokens", "0"), ("logprobs", "21"), ("stop", "")],
    ],
)
def test_impossible_options(folder, sentence, option, value):
    said = sentence("generate", "--model", folder, f"--{option}={value}", "hi")
    assert option.replace("-", "_") in said or f"--{option}" in said or "a stop text is empty" in said


def test_dtype_is_refused_by_the_parser(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--model", str(folder), "--dtype", "float8", "hi"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "float8" in err and "Traceback" not in err


def test_system_with_raw(folder, sentence):
    assert "--system needs a chat model" in sentence("generate", "--model", folder, "--raw", "--system", "be", "hi")
