"""Addresses of object stores are refused wherever a path is given, and leave no folder of that name."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from qwen_jax.cli import COMMANDS
from qwen_jax.errors import InputError
from qwen_jax.local_path import local_path

COMMAND_LINES = [
    "convert {model} gs://b/x",
    "convert gs://b/x new",
    "generate --model s3://b/x hello",
    "crosscheck --random qwen2 --plot gs://b/x.png",
    "crosscheck gs://b/x",
    "eval perplexity --text gs://b/x.txt",
    "eval perplexity --text README.md --plot gs://b/x.png",
    "eval sparse --text README.md --output gs://b/x.json",
    "data inspect gs://b/x.jsonl",
    "data tokenizer README.md --out gs://b/x",
    "train pretrain_tiny --out gs://b/x",
    "train pretrain_tiny --out new --export gs://b/x",
    "upcycle {model} gs://b/x",
    "compile --model gs://b/x --topology v5e-16",
]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_addresses_are_refused(line, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("text")
    monkeypatch.chdir(tmp_path)
    name, *arguments = line.format(model=tmp_path).split()
    module, function = COMMANDS[name][0].split(":")
    with pytest.raises(InputError, match=r"(gs|s3):// is not read or written yet; .* give a local path\."):
        getattr(importlib.import_module(module), function)(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_local_paths_are_kept():
    for path in ("a", "a/b:c", "/a//b", "c:/x", ".", "what:"):
        assert local_path(path) == Path(path)
