"""Folders that exist whole or not at all, and whose fault it is when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from qwen_jax.weights._files import new_folder
from qwen_jax.weights.export import save_hf
from qwen_jax.weights.open import open_checkpoint
from tests.weights.test_hf import make


def test_only_what_was_left_of_the_same_name_is_removed(tmp_path):
    for name in (".a.1234.partial", ".*.1234.partial", ".[ab].1234.partial"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "*"):
        assert not (tmp_path / ".*.1234.partial").exists()
    with new_folder(tmp_path / "[ab]"):
        assert not (tmp_path / ".[ab].1234.partial").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["*", ".a.1234.partial", "[ab]"]


@pytest.mark.parametrize("name", ["/models/source/model-00002.safetensors", "beside/model.safetensors"])
def test_a_file_that_is_lost_while_another_is_written_is_named(tmp_path: Path, name: str) -> None:
    lost = tmp_path / name
    with pytest.raises(InputError, match=f"{lost} cannot be read"), new_folder(tmp_path / "out"):
        raise FileNotFoundError(2, "No such file", str(lost))
    with pytest.raises(InputError, match="out could not be written"), new_folder(tmp_path / "out") as folder:
        raise FileNotFoundError(2, "No such file", str(folder / "config.json"))


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_a_source_that_vanishes_is_what_the_sentence_names(tmp_path, damage):
    checkpoint = open_checkpoint(make(tmp_path / "m", "qwen2"))
    weights = tmp_path / "m" / "model.safetensors"
    weights.unlink() if damage == "gone" else weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"m/model.safetensors (cannot be read|has become shorter)"):
        save_hf(checkpoint, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_read_is_what_the_sentence_names(tmp_path):
    folder = make(tmp_path / "m", "qwen2")
    checkpoint = open_checkpoint(folder)
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(InputError, match=r"m/tokenizer.json cannot be read"):
        save_hf(checkpoint, tmp_path / "out", progress=False)


def test_names_that_no_folder_can_have(tmp_path):
    (tmp_path / "file").write_text("")
    for name, reason in (("x" * 999, "file name too long"), ("file/x", "file exists")):
        with pytest.raises(InputError, match=f"could not be written .{reason}"), new_folder(tmp_path / name):
            pass
