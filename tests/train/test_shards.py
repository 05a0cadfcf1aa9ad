"""Token shards hold what the sources hold, and training on them is training on the sources."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.train.data_tools import assert_same, byte_tokenizer, numbered_texts, write_jsonl
from train.data import packing
from train.data.command import main
from train.data.config import DataConfig, SourceConfig
from train.data.loader import make_loader
from train.data.shards import Shards
from train.data.sources import open_source

TOKENIZER = byte_tokenizer()
TEXTS = ["", *numbered_texts(200), "<|endoftext|> in a text", "三句话。"]


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packing, "WINDOW_ROWS", 8)
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 0)


@pytest.fixture
def folder(tmp_path):
    """docs.jsonl, and the same as a folder of some shards."""
    write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    TOKENIZER.save(tmp_path / "tokenizer")
    arguments = [str(tmp_path / "docs.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--shard-tokens", "3000"]
    assert main(["shards", *arguments, "--out", str(tmp_path / "shards")]) == 0
    return tmp_path / "shards"


def config_of(path, **changes):
    config = DataConfig((SourceConfig(str(path)),), sequence_length=64, batch_size=6, epochs=2)
    return dataclasses.replace(config, **changes)


def take(config, count=None, rows=None):
    with make_loader(config, TOKENIZER, rows) as loader:
        return list(itertools.islice(loader, count))


def test_shards_hold_the_documents_in_order(folder):
    source = open_source(SourceConfig(str(folder)))
    assert isinstance(source, Shards) and len(list(folder.glob("*.tokens"))) > 2
    found = [TOKENIZER.decode(source[i].tolist()) for i in range(len(source))]
    assert found == [text + "<|endoftext|>" for text in TEXTS]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[150], source[150])
    assert source.num_tokens == sum(len(source[i]) for i in range(len(source)))


@pytest.mark.parametrize("kind", ["best-fit", "concat"])
def test_training_on_shards_is_training_on_the_texts(folder, kind):
    """Batch by batch, resumed in the middle, and the same from 1, 2 and 3 processes."""
    config = config_of(folder, packing=kind)
    whole = take(config)
    assert_same(whole, take(config_of(folder.parent / "docs.jsonl", packing=kind)))
    for count in (2, 3):
        for index in range(count):
            expected = [{name: array[index::count] for name, array in batch.items()} for batch in whole]
            assert_same(take(config, rows=range(index, 6, count)), expected)
    with make_loader(config, TOKENIZER) as loader:
        for _ in range(5):
            next(loader)
        place = json.loads(json.dumps(loader.get_state()))
    with make_loader(config, TOKENIZER) as loader:
        loader.set_state(place)
        assert_same(list(loader), whole[5:])


def test_what_cannot_be_used_is_said(folder):
    with pytest.raises(InputError, match="fill-in-the-middle cuts texts"):
        make_loader(config_of(folder, fim_rate=0.5), TOKENIZER)
    with pytest.raises(InputError, match="are of another tokenizer"):
        make_loader(config_of(folder), byte_tokenizer(["endoftext"]))
    arguments = [str(folder.parent / "docs.jsonl"), "--tokenizer", str(folder.parent / "tokenizer")]
    with pytest.raises(InputError, match="already exists"):
        main(["shards", *arguments, "--out", str(folder)])
    shard = folder / "shard-00001.tokens"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(InputError, match="not a whole folder of token shards .shard-00001.tokens has"):
        open_source(SourceConfig(str(folder)))
    (folder / "index.json").write_text('{"kind": 1}')
    with pytest.raises(InputError, match="not a whole folder of token shards"):
        open_source(SourceConfig(str(folder)))


def test_no_more_is_read_than_the_rows_of_a_process(folder, monkeypatch):
    """Of the tokens, which may be terabytes; lengths come from the index."""
    read = 0
    real = packing.make_row

    def counted(pieces, length, pad_id):
        nonlocal read
        read += len(pieces)
        assert all(isinstance(piece.tokens, np.memmap) for piece in pieces)
        return real(pieces, length, pad_id)

    monkeypatch.setattr("train.data.loader.make_row", counted)
    take(config_of(folder, epochs=1))
    of_all, read = read, 0
    take(config_of(folder, epochs=1), rows=[0])
    assert read < of_all / 3
